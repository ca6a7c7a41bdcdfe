"""ONNX files: ``export``, ``verify``, ``inspect``, ``optimize``."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from fastxattn.cli.common import Json, Overwrite, app, emit, working

Factory = Annotated[
    str, typer.Argument(metavar="MODULE:FUNCTION", help="function without arguments returning (module, example inputs)")
]
OnnxFile = Annotated[Path, typer.Argument(metavar="FILE.onnx")]


def _built(factory: str) -> tuple[Any, tuple[Any, ...]]:
    """What MODULE:FUNCTION returns; modules in the current folder can be named."""
    module, _, function = factory.partition(":")
    if not function:
        raise typer.BadParameter(f"must look like package.module:function; got {factory!r}")
    sys.path.insert(0, str(Path.cwd()))
    build = getattr(importlib.import_module(module), function, None)
    if build is None:
        raise typer.BadParameter(f"module {module!r} must have a function {function!r}; it has none")
    built, inputs = build()
    return built.eval(), tuple(inputs)


@app.command(epilog="Example: fastxattn export my_model:build model.onnx")
def export(
    factory: Factory,
    path: OnnxFile,
    opset: Annotated[int, typer.Option(help="18 to 24")] = 18,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Write a model to ONNX: portable, and fast with fastxattn's operator library."""
    from fastxattn import export as exporter

    module, inputs = _built(factory)
    with working(f"exporting to {path}"):
        done = exporter.to_onnx(module, inputs, path, opset=opset, overwrite=overwrite)
    emit(done, as_json)


@app.command(epilog="Example: fastxattn verify my_model:build model.onnx")
def verify(factory: Factory, path: OnnxFile, as_json: Json = False) -> None:
    """Compare an ONNX file with its model in float64, with and without fastxattn's library; exit 1 on failure."""
    from fastxattn import export as exporter

    module, inputs = _built(factory)
    with working(f"verifying {path}"):
        result = exporter.verify(path, module, inputs)
    emit(result, as_json)
    raise typer.Exit(0 if result.ok else 1)


@app.command(epilog="Example: fastxattn inspect theirs.onnx")
def inspect(path: OnnxFile, as_json: Json = False) -> None:
    """Lint any ONNX file for what breaks with attention; exit 1 on errors."""
    from fastxattn import export as exporter

    result = exporter.inspect(path)
    emit(result, as_json)
    raise typer.Exit(0 if result.ok else 1)


@app.command(epilog="Example: fastxattn optimize theirs.onnx --out faster.onnx")
def optimize(
    path: OnnxFile,
    out: Annotated[Path | None, typer.Option(help="file to write; <name>.fastxattn.onnx by default")] = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Rewrite the attention of an ONNX file into fastxattn nodes; outputs are compared before writing."""
    from fastxattn import export as exporter

    with working(f"optimizing {path}"):
        done = exporter.optimize(path, out, overwrite=overwrite)
    emit(done, as_json)
