"""Writing a model and its weights so that nothing changes unless everything was written."""

from __future__ import annotations

import contextlib
import math
import tempfile
from collections.abc import Iterator
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from onnx.external_data_helper import ExternalDataInfo, load_external_data_for_tensor, uses_external_data

SMALL = 64
"""Elements up to which external constants are read: scales, axes and shapes."""


def read(path: Path, *, weights: bool) -> onnx.ModelProto:
    """The model at ``path``, sound enough to be walked: no cycles, no missing inputs, no data outside its folder.

    Args:
        path: the file.
        weights: read all external data; else only small constants.

    Raises:
        ValueError: it is no ONNX model, or a malformed one; one line.
    """
    try:
        model = onnx.load(str(path), load_external_data=False)
        onnx.checker.check_model(_skeleton(model))
        for graph in _graphs(model.graph):
            for tensor in graph.initializer:
                if uses_external_data(tensor) and (weights or math.prod(tensor.dims) <= SMALL):
                    load_external_data_for_tensor(tensor, str(path.parent))
                    tensor.data_location = onnx.TensorProto.DEFAULT
                    del tensor.external_data[:]
            _open_axes([*graph.input, *graph.output, *graph.value_info])
    except (DecodeError, onnx.checker.ValidationError, ValueError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(f"{path} is not a valid ONNX model: {lines[0]}") from error
    return model


def _skeleton(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy for the checker, without weights, and with the shapes that it wants and runtimes do not."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    for graph in _graphs(copy.graph):
        for tensor in graph.initializer:
            if uses_external_data(tensor):
                tensor.CopyFrom(onnx.TensorProto(name=tensor.name, data_type=tensor.data_type, dims=[0]))
        for value in (*graph.input, *graph.output):
            if value.type.HasField("tensor_type"):
                value.type.tensor_type.shape.SetInParent()
    return copy


def _graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs) if attribute.HasField("g") else attribute.graphs:
                yield from _graphs(inner)


def _open_axes(values: list[onnx.ValueInfoProto]) -> None:
    """Axes declared -1, as old exporters write "dynamic", become open: shape inference ends the process on them."""
    for value in values:
        for dim in value.type.tensor_type.shape.dim:
            if dim.HasField("dim_value") and dim.dim_value < 0:
                dim.ClearField("dim_value")


@contextlib.contextmanager
def beside(path: Path, *, overwrite: bool) -> Iterator[Path]:
    """Yield a path of the same name in a folder beside ``path``; at the end its files are moved into place.

    ``<name>.data`` is the model's weights: one that lies there already is replaced only with ``overwrite``, and removed
    only where the model that is replaced names it and the new one has none. After an error nothing has changed.

    Raises:
        FileExistsError: a file is in the way and ``overwrite`` is False.
    """
    made = next(p for p in (path.parent, *path.parent.parents) if p.exists())
    data = path.with_name(f"{path.name}.data")
    with tempfile.TemporaryDirectory(dir=made, prefix=f".{path.name}.") as name:
        folder = Path(name) / "new"
        folder.mkdir()
        yield folder / path.name
        written = [folder / data.name, folder / path.name]  # weights before what names them
        targets = [data, path]
        for file, target in zip(written, targets, strict=True):
            if file.exists() and target.exists() and not overwrite:
                raise FileExistsError(f"{target} exists; pass overwrite=True to replace it")
        stale = not written[0].exists() and data.name in _locations(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        _move(written, targets, Path(name))
        if stale:
            data.unlink(missing_ok=True)


def _move(written: list[Path], targets: list[Path], folder: Path) -> None:
    """Move all or none."""
    kept: list[tuple[Path, Path]] = []
    moved: list[Path] = []
    try:
        for file, target in zip(written, targets, strict=True):
            if file.exists():
                if target.exists():
                    kept.append((target.replace(folder / target.name), target))
                moved.append(file.replace(target))
    except BaseException:
        for target in moved:
            target.unlink()
        for old, target in kept:
            old.replace(target)
        raise


def _locations(path: Path) -> set[str]:
    """Names of the files of weights that the model at ``path`` reads."""
    try:
        model = onnx.load(str(path), load_external_data=False)
    except (OSError, DecodeError):
        return set()
    external = (t for t in model.graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL)
    return {ExternalDataInfo(tensor).location for tensor in external}
