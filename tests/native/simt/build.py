"""Builds the library of all kernels under the SIMT runner (every ``bind_*.cpp`` of this folder) and calls it.

``load()`` gives a :class:`Simt`, whose attributes are the bound functions: ``simt.reverse(x=x, y=y, fault="sound")``.
Objects are kept in build/ with their dependency files, as build_native.py keeps its own; a lock lets test processes
that start together build once.
"""

from __future__ import annotations

import ctypes
import fcntl
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[3]
HERE = Path(__file__).resolve().parent
COUNTS = ("load", "store", "ldmatrix", "cp_async")


class SimtFault(RuntimeError):
    """What the runner found wrong with a kernel."""


class _Argument(ctypes.Structure):
    """As in bind.h."""

    _fields_ = (
        ("name", ctypes.c_char_p),
        ("data", ctypes.c_void_p),
        ("text", ctypes.c_char_p),
        ("number", ctypes.c_double),
        ("bytes", ctypes.c_int64),
        ("itemsize", ctypes.c_int64),
        ("dims", ctypes.c_int64),
        ("shape", ctypes.c_int64 * 4),
        ("strides", ctypes.c_int64 * 4),
    )


def _argument(name: str, value: Any) -> _Argument:
    if isinstance(value, str):
        return _Argument(name=name.encode(), text=value.encode())
    if not isinstance(value, np.ndarray):
        return _Argument(name=name.encode(), number=float(value))
    # Everything between an array's first and last byte is one buffer: a view may step over elements.
    strides = [s // value.itemsize for s in value.strides]
    extent = 1 + sum((n - 1) * s for n, s in zip(value.shape, strides, strict=True)) if value.size else 0
    pad = [0] * (4 - value.ndim)
    return _Argument(
        name.encode(),
        value.ctypes.data,
        None,
        0.0,
        extent * value.itemsize,
        value.itemsize,
        value.ndim,
        (ctypes.c_int64 * 4)(*value.shape, *pad),
        (ctypes.c_int64 * 4)(*strides, *pad),
    )


class Simt:
    """The bound functions. Each takes keywords (arrays, numbers, strings; None is as absent) and returns counts."""

    def __init__(self, path: Path) -> None:
        self._call = ctypes.CDLL(str(path)).fxa_simt_call
        self._call.restype = ctypes.c_char_p

    def __getattr__(self, name: str) -> Callable[..., dict[str, Any]]:
        def call(**keywords: Any) -> dict[str, Any]:
            given = [_argument(k, v) for k, v in keywords.items() if v is not None]
            counts = (ctypes.c_uint64 * 12)()
            message = self._call(name.encode(), (_Argument * len(given))(*given), len(given), counts)
            if message is not None:
                raise SimtFault(message.decode())
            pairs = {kind: (counts[2 * i], counts[2 * i + 1]) for i, kind in enumerate(COUNTS)}
            return pairs | {"mma": counts[8], "barriers": counts[9], "wgmma": counts[10], "tma": counts[11]}

        return call


def build() -> Path:
    """The library's path; raises build_native.NativeBuildError when it cannot be built."""
    sys.path.insert(0, str(ROOT))
    import build_native

    out = ROOT / "build/simt"
    out.mkdir(parents=True, exist_ok=True)
    tool = build_native.Toolchain.find()
    flags = [f"-I{HERE.parent}", "-Wno-unknown-pragmas", "-fno-stack-protector"]
    if "avx2" in tool.isas:
        flags += ["-mavx2", "-mfma"]  # for the emulated matrix products
    # The time goes into the runner; the kernels themselves are large, and -O1 halves their compilation.
    levels = {source: "-O1" if source.stem.startswith("bind_") else "-O2" for source in sorted(HERE.glob("*.cpp"))}
    units = [build_native.Unit(source, (*flags, level)) for source, level in levels.items()]
    target = out / "libfastxattn_simt.so"
    with (out / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        build_native.link(tool, units, target, out / "obj", [], [])
    return target


def load() -> Simt:
    """Build and load the library."""
    return Simt(build())


if __name__ == "__main__":
    print(build())
