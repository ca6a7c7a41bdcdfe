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

from fastxattn.export.files import beside
from fastxattn.export.flat import Flat, bind, evaluate, free, open_lengths, tensors
from fastxattn.export.operations import DOMAIN, functions, translations
from fastxattn.export.parity import check_sizes
from fastxattn.export.sizes import Example, Inputs
from fastxattn.ops.onnx_parts import loop_conditions

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
    compared: tuple[str, ...]
    """Sizes at which the file was compared with the module, with and without the operator library."""

    def __str__(self) -> str:
        ops = ", ".join(f"{count} x {name}" for name, count in self.nodes.items()) or "no fastxattn operators"
        size = f"{self.bytes / 2**20:.1f} MiB"
        return f"{self.path}: opset {self.opset}, {size}, {ops}, compared at {len(self.compared)} sizes"


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
    (:func:`ort_library_path`) runs the kernel. The file is compared with the module at several sizes, both ways, before
    it is moved into place.

    Args:
        module: in eval mode, on the CPU; it is not changed.
        args: example inputs (tensors, PackedTokens, lists and dicts of them). Their sizes do not matter.
        path: the file to write, usually ``*.onnx``.
        kwargs: example keyword inputs.
        dynamic: True: every axis that the module does not itself fix stays open (token totals, batch, lengths; an
            axis of size 1 in the example too). False: the example's sizes. Else, by input name, the open axes:
            ``{"query": {0: "tokens"}}``. False instead of a name fixes an axis at the example's size; where all are
            False, every other axis stays open.
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
        ValueError: a wrong opset, dtype or form; a part in training mode; or the file differs from the module on the
            example or at another size, which names the axis. Nothing is written then.

    Example:
        >>> report = fastxattn.export.to_onnx(model.eval(), (tokens,), "model.onnx")
    """
    path = Path(path)
    if opset not in OPSETS:
        raise ValueError(f"opset must be in {OPSETS.start}..{OPSETS.stop - 1}; got {opset}")
    if dtype not in (None, torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"dtype must be torch.float32, float16 or bfloat16; got {dtype}")
    local = functions(form, opset)
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} exists; pass overwrite=True to replace it")
    for name, part in module.named_modules():
        if part.training:
            raise ValueError(f"module must be in eval mode, all of it: call module.eval() first; {name or 'it'} trains")
    inputs: Inputs = (tuple(args), dict(kwargs or {}))
    if dtype is not None:
        module = copy.deepcopy(module).to(dtype)
        inputs = _convert(inputs, dtype)
    fixed = _fixed(tensors(bind(module, *inputs)), dynamic)
    traced = Example(module, *inputs, fixed)
    if dynamic is not False:
        traced = Example(module, *traced.grown(lambda larger: _accepts(module, larger)), fixed)
    program, names = _trace(module, traced.resized({}), dynamic, opset)
    model = program.model
    used = _count(model.graph)
    model.functions.clear()  # the optimizer need not know them
    program.optimize()
    _name(model.graph, list(input_names or tensors(bind(module, *inputs))), names, output_names)
    _close(program)
    loop_conditions(model.graph)
    for name in used:
        model.functions[(DOMAIN, name, "")] = onnxscript.ir.serde.deserialize_function(local[name])
    if used:
        model.opset_imports[DOMAIN] = 1
    weights = sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value)
    external = weights > _EXTERNAL_ABOVE if external_data is None else external_data
    with beside(path, overwrite=overwrite) as fresh:
        program.save(str(fresh), external_data=external)
        compared = check_sizes(fresh, module, inputs, traced, bounded="Select" in used)
        size = sum(file.stat().st_size for file in fresh.parent.iterdir())
    taken, given = (tuple(value.name or "" for value in side) for side in (model.graph.inputs, model.graph.outputs))
    return Exported(path, opset, taken, given, used, size, compared)


def _trace(
    module: torch.nn.Module, inputs: Inputs, dynamic: bool | Mapping[str, Mapping[int, Any]], opset: int
) -> tuple[torch.onnx.ONNXProgram, list[str]]:
    """Run torch's exporter with translations of the fastxattn operators; its advice to exporter authors is silenced."""
    flat = Flat(module, *inputs)
    leaves = tensors(bind(module, *inputs))
    loud = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = loud.level
    loud.setLevel(logging.ERROR)
    try:
        with torch.no_grad(), warnings.catch_warnings(), open_lengths():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                flat,
                tuple(leaves.values()),
                dynamo=True,
                verbose=False,
                optimize=False,
                opset_version=opset,
                dynamic_shapes=_axes(leaves, dynamic),
                custom_translation_table=translations(),
            )
    finally:
        loud.setLevel(level)
    assert program is not None  # torch returns None only when it is given a file
    return program, list(flat.traced.output_names)


def _accepts(module: torch.nn.Module, inputs: Inputs) -> bool:
    try:
        evaluate(module, inputs)
    except Exception:
        return False
    return True


def _close(program: torch.onnx.ONNXProgram) -> None:
    """Declare the sizes of the inputs that the module fixes, which torch leaves open: another is refused at once."""
    assert program.exported_program is not None
    ranges = program.exported_program.range_constraints
    fixed = {str(name): int(found.lower) for name, found in ranges.items() if found.lower == found.upper}
    for value in program.model.graph.inputs:
        dims = [fixed.get(str(getattr(dim, "value", dim)), dim) for dim in value.shape or ()]
        value.shape = onnxscript.ir.Shape(dims)


def _name(graph: Any, inputs: list[str], outputs: list[str], chosen: Sequence[str] | None) -> None:
    """Name inputs and outputs; an output that is an input, a weight or another output becomes a value of its own."""
    for kind, names, values in (("input", inputs, graph.inputs), ("output", chosen or outputs, graph.outputs)):
        if len(names) != len(values):
            raise ValueError(f"{kind}_names must name {len(values)} {kind}s; got {list(names)}")
    taken: set[str] = set()
    wanted = [*(free(name, taken) for name in inputs)]
    own = [*chosen] if chosen else [free(name if name not in taken else f"output_{name}", taken) for name in outputs]
    if len({*inputs, *own}) != len(inputs) + len(own):
        raise ValueError(f"input_names and output_names must all differ; got {inputs} and {own}")
    ends: list[Any] = []
    for i, value in enumerate(graph.outputs):
        if value.producer() is None or any(value is end for end in ends):
            copied = onnxscript.ir.node("Identity", [value])
            graph.append(copied)
            copied.outputs[0].shape, copied.outputs[0].type = value.shape, value.type
            graph.outputs[i] = value = copied.outputs[0]
        ends.append(value)
    reserved = {*wanted, *own}
    used = set(reserved)
    for node in graph.all_nodes():
        for value in node.outputs:
            if value.name in reserved:
                value.name = free(f"{value.name}_inner", used)
    for value in list(graph.initializers.values()):
        if value.name in reserved:
            value.name = free(f"{value.name}_weight", used)
    for value, name in zip([*graph.inputs, *ends], [*wanted, *own], strict=True):
        value.name = name


def _convert(tree: Any, dtype: torch.dtype) -> Any:
    return torch.utils._pytree.tree_map(
        lambda x: x.to(dtype) if isinstance(x, torch.Tensor) and x.is_floating_point() else x, tree
    )


def _fixed(inputs: Mapping[str, torch.Tensor], dynamic: bool | Mapping[str, Mapping[int, Any]]) -> set[tuple[str, int]]:
    """(input, axis) of the axes that ``dynamic`` fixes."""
    if isinstance(dynamic, bool):
        return set() if dynamic else {(name, axis) for name, x in inputs.items() for axis in range(x.ndim)}
    unknown = sorted(set(dynamic) - set(inputs))
    if unknown:
        raise ValueError(f"dynamic names unknown inputs: {unknown}; the inputs are {list(inputs)}")
    given = {(name, axis): value for name, axes in dynamic.items() for axis, value in axes.items()}
    closed = {key for key, value in given.items() if value is False}
    if len(closed) == len(given):
        return closed
    return {(name, axis) for name, x in inputs.items() for axis in range(x.ndim)} - (set(given) - closed)


def _axes(inputs: Mapping[str, torch.Tensor], dynamic: bool | Mapping[str, Mapping[int, Any]]) -> Any:
    """torch.export's ``dynamic_shapes`` for Flat: every axis open, to be closed only where the module fixes it."""
    if dynamic is False:
        return None
    fixed, given = _fixed(inputs, dynamic), {} if dynamic is True else dynamic

    def one(name: str, axis: int) -> Any:
        if (name, axis) in fixed:
            return torch.export.Dim.STATIC
        return given.get(name, {}).get(axis, torch.export.Dim.AUTO)

    return {"leaves": tuple({axis: one(name, axis) for axis in range(x.ndim)} for name, x in inputs.items())}


def _count(graph: Any) -> dict[str, int]:
    counts: dict[str, int] = {}
    for node in graph.all_nodes():
        if node.domain == DOMAIN:
            counts[node.op_type] = counts.get(node.op_type, 0) + 1
    return counts
