"""What the machine can do at most, measured in the same run, and the share of it that a call reached."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from benchmarks.harness.device import on_device
from fastxattn.runtime import native

_COPY = 1 << 25  # float32 numbers: 128 MiB read and as much written, beyond any cache
_buffers: list[torch.Tensor] = []


@dataclass(frozen=True)
class Peak:
    """The two bounds of a CPU: arithmetic and memory. NaN where they are not measured."""

    gflops: float
    """GFLOP/s of all threads in use, each as fast as one alone on cached data."""
    gbytes: float
    """GB/s to and from memory: a large copy's, or a large sum's where reading alone is faster."""

    def share(self, flops: float, moved: float, seconds: float) -> tuple[float, str]:
        """How much of its bound a call reached: the least time it could have taken / the time it took.

        Args:
            flops: useful operations; 0 when they do not bound it.
            moved: useful bytes read and written; 0 when they are not counted.
            seconds: what the call took.

        Returns:
            The share and which bound it is, ``compute`` or ``memory``; NaN and "" when there is nothing to compare
            with. What lies in a cache may exceed the memory's bound.
        """
        bounds = (flops, self.gflops, "compute"), (moved, self.gbytes, "memory")
        least = [(work / (peak * 1e9), bound) for work, peak, bound in bounds if work and peak > 0]
        longest, bound = max(least, default=(math.nan, ""))
        return longest / seconds, bound


def measure_peak(dtype: torch.dtype, device: str = "cpu") -> Peak:
    """Measure both (about a fifth of a second): of a CPU, or of the GPU that ``device="cuda"`` means.

    bfloat16 on a processor without a bfloat16 dot product computes in float32, and float16 always does: their peak is
    float32's there. A GPU's are those of a large product and a large copy.
    """
    if device == "cuda":
        return _gpu_peak(dtype)
    return Peak(native.peak_gflops(dtype) * torch.get_num_threads() or math.nan, memory_gbytes())


@functools.cache
def _gpu_peak(dtype: torch.dtype) -> Peak:
    side = 8192 if dtype.itemsize < 4 else 4096
    a, b = torch.randn(2, side, side, device="cuda").to(dtype)
    source, target = torch.ones(2, 1 << 28, device="cuda")
    found = on_device({"product": lambda: a @ b, "copy": lambda: target.copy_(source)}, rounds=7)
    return Peak(2e-9 * side**3 / found["product"].median, 2e-9 * source.nbytes / found["copy"].median)


def memory_gbytes() -> float:
    """GB/s that torch's threads move: of copying 128 MiB (bytes read plus bytes written) or of summing them."""
    if not _buffers:
        _buffers.extend(torch.ones(_COPY) for _ in range(2))
    source, target = _buffers
    copying = _fastest(lambda: target.copy_(source))
    return max(2 * source.nbytes / copying, source.nbytes / _fastest(source.sum)) / 1e9


def _fastest(call: Callable[[], object]) -> float:
    times = []
    for _ in range(3):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)
