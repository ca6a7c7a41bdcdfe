"""What the machine can do at most, measured in the same run, and the share of it that a call reached."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import torch

from fastxattn.runtime import native

_COPY = 1 << 25  # float32 numbers: 128 MiB read and as much written, beyond any cache
_buffers: list[torch.Tensor] = []


@dataclass(frozen=True)
class Peak:
    """The two bounds of a CPU: arithmetic and memory. NaN where they are not measured."""

    gflops: float
    """GFLOP/s of all threads in use, each as fast as one alone on cached data."""
    gbytes: float
    """GB/s read and written by a large copy."""

    def share(self, flops: float, moved: float, seconds: float) -> float:
        """How much of the bound a call reached: the least time it could have taken / the time it took.

        Args:
            flops: useful operations; 0 when they do not bound it.
            moved: useful bytes read and written; 0 when they are not counted.
            seconds: what the call took.

        Returns:
            NaN when there is nothing to compare with.
        """
        bounds = (flops, self.gflops), (moved, self.gbytes)
        least = [work / (peak * 1e9) for work, peak in bounds if work and peak > 0]
        return max(least) / seconds if least else math.nan


def measure_peak(dtype: torch.dtype) -> Peak:
    """Measure both (about a tenth of a second); on a machine with a GPU in use, NaN.

    bfloat16 on a processor without a bfloat16 dot product computes in float32, and float16 always does: their peak is
    float32's there.
    """
    if torch.cuda.is_available():
        return Peak(math.nan, math.nan)
    return Peak(native.peak_gflops(dtype) * torch.get_num_threads() or math.nan, copy_gbytes())


def copy_gbytes() -> float:
    """GB/s of copying 128 MiB with torch's threads: bytes read plus bytes written."""
    if not _buffers:
        _buffers.extend(torch.ones(_COPY) for _ in range(2))
    source, target = _buffers
    best = math.inf
    for _ in range(3):
        start = time.perf_counter()
        target.copy_(source)
        best = min(best, time.perf_counter() - start)
    return 2 * source.nbytes / best / 1e9
