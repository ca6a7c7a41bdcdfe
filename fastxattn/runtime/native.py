"""Loads the compiled libraries, once and only when a backend needs them.

A library that was never built and one that does not load are different faults with different remedies; each
gets its own message. ``import fastxattn`` itself loads nothing.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from fastxattn.runtime import env

LIBRARY_DIR = Path(__file__).resolve().parent.parent / "_lib"
before_cpu: list[Callable[[], None]] = []
"""Called before the CPU library registers its kernels."""
after_cuda: list[Callable[[], None]] = []
"""Called when the CUDA library has defined its operators."""


@dataclass(frozen=True)
class Loaded:
    """A loaded library, or the reason there is none."""

    library: ctypes.CDLL | None
    reason: str | None  # None: loaded


@functools.cache
def cpu_library() -> Loaded:
    """The CPU kernels (``libfastxattn_cpu.so``), loaded at the first call."""
    for prepare in before_cpu:
        prepare()
    loaded = _load(LIBRARY_DIR / "libfastxattn_cpu.so", "the CPU kernels", "pip install --no-build-isolation .")
    library = loaded.library
    if library is None:
        return loaded
    library.fastxattn_cpu_isa.restype = library.fastxattn_cpu_isas.restype = ctypes.c_char_p
    library.fastxattn_force_cpu_isa.argtypes = [ctypes.c_char_p]
    library.fastxattn_peak_gflops.restype = ctypes.c_double
    if env.forced_cpu_isa and not library.fastxattn_force_cpu_isa(env.forced_cpu_isa.encode()):
        raise ValueError(
            f"environment variable FASTXATTN_CPU_ISA must be one of {', '.join(_available(library))} on this "
            f"machine; got {env.forced_cpu_isa!r}"
        )
    return loaded


@functools.cache
def cuda_library() -> Loaded:
    """The CUDA kernels (``libfastxattn_cuda.so``), loaded at the first call."""
    loaded = _load(
        LIBRARY_DIR / "libfastxattn_cuda.so",
        "the CUDA kernels",
        "FASTXATTN_BUILD_CUDA=1 pip install --no-build-isolation .",
    )
    if loaded.library is not None:
        for finish in after_cuda:
            finish()
        loaded.library.fastxattn_cuda_archs.restype = ctypes.c_char_p
    return loaded


def cuda_archs() -> tuple[str, ...]:
    """Architectures that the CUDA library has machine code for, as in ``sm_80``; empty without the library."""
    library = cuda_library().library
    return () if library is None else tuple(f"sm_{a}" for a in library.fastxattn_cuda_archs().decode().split())


def _load(path: Path, what: str, remedy: str) -> Loaded:
    if not path.exists():
        return Loaded(None, f"{what} were not built with this installation; build them with `{remedy}`")
    try:
        torch.ops.load_library(str(path))  # type: ignore[no-untyped-call]
        return Loaded(ctypes.CDLL(str(path)), None)
    except OSError as error:
        remedy = f"rebuild them against torch {torch.__version__}"
        return Loaded(None, f"{what} were built but {path.name} does not load ({error}); {remedy}")


def _available(library: ctypes.CDLL) -> tuple[str, ...]:
    return tuple(library.fastxattn_cpu_isas().decode().split())


def available_cpu_isas() -> tuple[str, ...]:
    """Instruction sets that are compiled in and that this machine runs, slowest first; empty without the library."""
    library = cpu_library().library
    return () if library is None else _available(library)


def active_cpu_isa() -> str | None:
    """The instruction set the CPU kernels run on, or None without the library."""
    library = cpu_library().library
    return None if library is None else library.fastxattn_cpu_isa().decode()


def narrow_cpu_vectors() -> bool:
    """Whether the CPU kernels run on vectors of fewer than 16 floats; False without the library."""
    isa = active_cpu_isa()
    return isa is not None and not isa.startswith("avx512")


def force_cpu_isa(name: str) -> None:
    """Run the CPU kernels on one instruction set from now on; ``"auto"`` lifts it.

    Raises:
        ValueError: ``name`` is not in :func:`available_cpu_isas`.
        RuntimeError: the CPU library is not there.
    """
    loaded = cpu_library()
    if loaded.library is None:
        raise RuntimeError(f"cannot force a CPU instruction set: {loaded.reason}")
    if not loaded.library.fastxattn_force_cpu_isa(name.encode()):
        raise ValueError(f"name must be auto or one of {', '.join(_available(loaded.library))}; got {name!r}")


def peak_gflops(dtype: torch.dtype) -> float:
    """Measured single-thread GFLOP/s of the CPU micro-kernel on cached data (about 30 ms); 0 without the library.

    bfloat16 on a processor without a bf16 dot product computes in float32, so its peak is float32's.
    """
    library = cpu_library().library
    if library is None:
        return 0.0
    peak: float = library.fastxattn_peak_gflops(int(dtype == torch.bfloat16))
    return peak or float(library.fastxattn_peak_gflops(0))
