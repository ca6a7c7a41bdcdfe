"""Writing a model and its weights so that nothing changes unless everything was written."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError
from onnx.external_data_helper import ExternalDataInfo


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
