"""``to_aoti``: an ahead-of-time compiled package for torch's C++ runtime, no Python at run time."""

from __future__ import annotations

import importlib
import pkgutil
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastxattn import ops
from fastxattn.export.flat import Flat, bind, tensors
from fastxattn.runtime import native


@dataclass(frozen=True)
class Package:
    """What :func:`to_aoti` wrote."""

    path: Path
    schemas: Path
    """The fastxattn operators that the package calls, one schema a line, for programs without Python."""
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


def to_aoti(
    module: torch.nn.Module,
    args: Sequence[Any],
    path: str | Path,
    *,
    kwargs: Mapping[str, Any] | None = None,
    dynamic: bool = True,
    overwrite: bool = False,
) -> Package:
    """Compile ``module`` with AOTInductor into a ``.pt2`` package that calls fastxattn's CPU kernels.

    From Python: ``torch._inductor.aoti_load_package(path)`` after ``import fastxattn`` and :func:`load_kernels`. From
    C++: see ``examples/aoti``; the program defines the operators listed in ``<path>.schemas`` and loads
    ``libfastxattn_cpu.so``.

    Args:
        module: in eval mode, on the CPU.
        args: example inputs; a PackedTokens counts as its values and offsets, here and when the package runs.
        path: the package to write, ``*.pt2``.
        kwargs: example keyword inputs.
        dynamic: leave open every axis that the module does not itself fix (sizes 0 and 1 in the example are taken as
            they are: give an example of at least 2).
        overwrite: replace existing files.

    Raises:
        FileExistsError: a file exists and ``overwrite`` is False.
        RuntimeError: the CPU kernels are not built.
    """
    path = Path(path)
    schemas = path.with_name(path.name + ".schemas")
    for file in (path, schemas):
        if file.exists() and not overwrite:
            raise FileExistsError(f"{file} exists; pass overwrite=True to replace it")
    load_kernels()
    kwargs = dict(kwargs or {})
    flat, inputs = Flat(module, args, kwargs), tensors(bind(module, args, kwargs))
    axes = tuple(dict.fromkeys(range(x.ndim), torch.export.Dim.AUTO) for x in inputs.values())
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(
            flat, tuple(inputs.values()), dynamic_shapes={"leaves": axes} if dynamic else None, strict=False
        )
        names = tuple(flat.traced.output_names)
        path.parent.mkdir(parents=True, exist_ok=True)
        torch._inductor.aoti_compile_and_package(program, package_path=str(path))
    used = {
        node.target._schema
        for node in program.graph.nodes
        if isinstance(node.target, torch._ops.OpOverload) and node.target.namespace == "fastxattn"
    }
    schemas.write_text("".join(f"{str(schema).removeprefix('fastxattn::')}\n" for schema in sorted(used, key=str)))
    return Package(path, schemas, tuple(inputs), names)


def load_kernels() -> None:
    """Define every operator and load the CPU kernels: what a saved program needs before it is loaded.

    Raises:
        RuntimeError: they are not there; the message says why.
    """
    reason = native.cpu_library().reason
    if reason is not None:
        raise RuntimeError(f"AOTInductor packages need the CPU kernels: {reason}")
    for package in pkgutil.iter_modules(ops.__path__):
        if package.ispkg:
            importlib.import_module(f"fastxattn.ops.{package.name}")
