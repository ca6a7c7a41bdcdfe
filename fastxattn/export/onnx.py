"""``to_onnx``: one file that any ONNX runtime runs, and that runs fast where the operator library is registered."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnxscript
import torch

from fastxattn.export.flat import Flat, bind, tensors
from fastxattn.export.operations import DOMAIN, functions, translations

OPSETS = range(18, 25)
"""Opsets that today's runtimes execute in full."""
_EXTERNAL_ABOVE = 1 << 30  # bytes of weights; a protobuf file ends at 2 GiB


@dataclass(frozen=True)
class Exported:
    """What :func:`to_onnx` wrote."""

    path: Path
    opset: int
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    nodes: Mapping[str, int]
    """How many nodes of each fastxattn operator the graph has."""
    bytes: int
    """Size of the file and of its external data."""

    def __str__(self) -> str:
        ops = ", ".join(f"{count} x {name}" for name, count in self.nodes.items()) or "no fastxattn operators"
        return f"{self.path}: opset {self.opset}, {self.bytes / 2**20:.1f} MiB, {ops}"


def to_onnx(
    module: torch.nn.Module,
    args: Sequence[Any],
    path: str | Path,
    *,
    kwargs: Mapping[str, Any] | None = None,
    dynamic: bool | Mapping[str, Mapping[int, Any]] = True,
    opset: int = 18,
    dtype: torch.dtype | None = None,
    form: str = "loop",
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    external_data: bool | None = None,
    overwrite: bool = False,
) -> Exported:
    """Export ``module`` with ``torch.onnx.export(dynamo=True)``; each fastxattn operator becomes one node.

    A node lies in the domain ``fastxattn`` and the file carries a function of the same name made of standard
    operators. A runtime that does not know the operator inlines the function; one with the operator library registered
    (:func:`ort_library_path`) runs the kernel.

    Args:
        module: in eval mode, on the CPU; it is not changed.
        args: example inputs (tensors, PackedTokens, lists and dicts of them). Their sizes do not matter.
        path: the file to write, usually ``*.onnx``.
        kwargs: example keyword inputs.
        dynamic: True: every axis that the module does not itself fix stays open (token totals, batch, lengths; an
            axis of size 1 in the example too). False: the example's sizes. Else, by input name, the open axes:
            ``{"query": {0: "tokens"}}``.
        opset: 18 to 24. Later opsets have no attention kernel in today's ONNX Runtime.
        dtype: convert floating-point weights and example inputs to float32, float16 or bfloat16 first.
        form: of attention's portable body: ``"loop"`` over sequences, or ``"padded"`` for runtimes without sequence
            operators (one masked product over the longest lengths).
        input_names: names of the graph's inputs; the parameters' names when None.
        output_names: names of its outputs.
        external_data: keep weights in a second file, ``<name>.data``. None: when they exceed 1 GiB.
        overwrite: replace an existing file.

    Raises:
        FileExistsError: the file exists and ``overwrite`` is False.
        ValueError: a wrong opset, dtype or form, or dropout that is switched on.

    Example:
        >>> report = fastxattn.export.to_onnx(model.eval(), (tokens,), "model.onnx")
    """
    path = Path(path)
    if opset not in OPSETS:
        raise ValueError(f"opset must be in {OPSETS.start}..{OPSETS.stop - 1}; got {opset}")
    if dtype not in (None, torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"dtype must be torch.float32, float16 or bfloat16; got {dtype}")
    local = functions(form, opset)
    data = path.with_name(path.name + ".data")
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} exists; pass overwrite=True to replace it")
    if module.training:
        raise ValueError("module must be in eval mode: call module.eval() first")
    kwargs = dict(kwargs or {})
    if dtype is not None:
        module = copy.deepcopy(module).to(dtype)
        args, kwargs = _convert((tuple(args), kwargs), dtype)
    program = _trace(module, args, kwargs, dynamic, opset, input_names, output_names)
    model = program.model
    used = _count(model.graph)
    model.functions.clear()  # the optimizer need not know them
    program.optimize()
    for name in used:
        model.functions[(DOMAIN, name, "")] = onnxscript.ir.serde.deserialize_function(local[name])
    if used:
        model.opset_imports[DOMAIN] = 1
    weights = sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value)
    external = weights > _EXTERNAL_ABOVE if external_data is None else external_data
    path.parent.mkdir(parents=True, exist_ok=True)
    # The old data file would be appended to, not replaced.
    data.unlink(missing_ok=True)
    program.save(str(path), external_data=external)
    size = path.stat().st_size + (data.stat().st_size if data.exists() else 0)
    names = [[value.name or "" for value in values] for values in (model.graph.inputs, model.graph.outputs)]
    return Exported(path, opset, tuple(names[0]), tuple(names[1]), used, size)


def _trace(
    module: torch.nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    dynamic: bool | Mapping[str, Mapping[int, Any]],
    opset: int,
    input_names: Sequence[str] | None,
    output_names: Sequence[str] | None,
) -> torch.onnx.ONNXProgram:
    """Run torch's exporter with translations of the fastxattn operators; its advice to exporter authors is silenced."""
    flat = Flat(module, args, kwargs)
    inputs = tensors(bind(module, args, kwargs))
    loud = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = loud.level
    loud.setLevel(logging.ERROR)
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                flat,
                tuple(inputs.values()),
                dynamo=True,
                verbose=False,
                optimize=False,
                opset_version=opset,
                dynamic_shapes=_axes(inputs, dynamic),
                input_names=list(input_names or inputs),
                custom_translation_table=translations(),
            )
    finally:
        loud.setLevel(level)
    assert program is not None  # torch returns None only when it is given a file
    for value, name in zip(program.model.graph.outputs, output_names or flat.traced.output_names, strict=True):
        value.name = name
    return program


def _convert(tree: Any, dtype: torch.dtype) -> Any:
    return torch.utils._pytree.tree_map(
        lambda x: x.to(dtype) if isinstance(x, torch.Tensor) and x.is_floating_point() else x, tree
    )


def _axes(inputs: Mapping[str, torch.Tensor], dynamic: bool | Mapping[str, Mapping[int, Any]]) -> Any:
    """torch.export's ``dynamic_shapes`` for Flat: every axis open, to be closed only where the module fixes it."""
    if dynamic is False:
        return None
    given = {} if dynamic is True else dynamic
    unknown = sorted(set(given) - set(inputs))
    if unknown:
        raise ValueError(f"dynamic names unknown inputs: {unknown}; the inputs are {list(inputs)}")
    open_axes = [
        dict.fromkeys(range(x.ndim), torch.export.Dim.AUTO) if dynamic is True else {} for x in inputs.values()
    ]
    return {"leaves": tuple({**axes, **given.get(name, {})} for name, axes in zip(inputs, open_axes, strict=True))}


def _count(graph: Any) -> dict[str, int]:
    counts: dict[str, int] = {}
    for node in graph.all_nodes():
        if node.domain == DOMAIN:
            counts[node.op_type] = counts.get(node.op_type, 0) + 1
    return counts
