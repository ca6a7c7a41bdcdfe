"""Time and peak memory of calls, and the machine they were measured on.

Rivals are timed in turn, in one process, on the same data.
"""

from __future__ import annotations

import ctypes
import functools
import gc
import math
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from fastxattn.runtime import native

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


class OutOfTime(Exception):
    """Three rounds would end too late."""


@dataclass(frozen=True)
class Timing:
    """Seconds per call of one provider, one entry per round."""

    rounds: tuple[float, ...]

    @property
    def median(self) -> float:
        """Median seconds per call."""
        return statistics.median(self.rounds)

    def ratio_to(self, other: Timing) -> float:
        """How many times faster this is than ``other``: the median of the round-by-round ratios.

        Rounds are paired because a shared machine drifts: both sides of a pair saw the same moment.
        """
        return statistics.median(b / a for a, b in zip(self.rounds, other.rounds, strict=True))


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def interleaved(
    providers: Mapping[str, Callable[[], object]],
    *,
    rounds: int = 11,
    min_seconds: float = 0.004,
    max_seconds: float = math.inf,
    deadline: float = math.inf,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Timing]:
    """Time every provider in turn, ``rounds`` times over, the order rotating from round to round.

    Each entry is the mean of as many calls as fill ``min_seconds``, so that microsecond calls are measurable. After
    ``max_seconds`` no new round begins, except that there are at least three. ``clock=time.process_time``, on one
    thread, measures what a call takes of a processor that other work shares.

    Raises:
        OutOfTime: the first calls say that three rounds would not end by ``deadline`` (as ``time.time()`` counts).
    """
    began = time.perf_counter()
    repeats: dict[str, int] = {}
    round_seconds = 0.0
    for name, call in providers.items():
        taken_once = 0.0
        for _ in range(2):  # the first call may compile and fill caches; one of a second or more says enough
            if taken_once < 1.0:
                start = clock()
                call()
                _synchronize()
                taken_once = clock() - start
        repeats[name] = max(1, round(min_seconds / max(taken_once, 1e-7)))
        round_seconds += repeats[name] * taken_once
        if time.time() + 3 * round_seconds > deadline:
            raise OutOfTime
    names, taken = list(providers), {name: [] for name in providers}  # type: ignore[var-annotated]
    for i in range(rounds):
        if i >= 3 and time.perf_counter() - began > max_seconds:
            break
        for name in names[i % len(names) :] + names[: i % len(names)]:
            call = providers[name]
            _synchronize()
            start = clock()
            for _ in range(repeats[name]):
                call()
            _synchronize()
            taken[name].append((clock() - start) / repeats[name])
    return {name: Timing(tuple(values)) for name, values in taken.items()}


def peak_extra_bytes(call: Callable[[], object], *, warm: bool = False) -> int | None:
    """Bytes that ``call`` needed at its worst moment beyond what was in use before it; None where unknown.

    On Linux the kernel's high-water mark of resident memory is reset and read back, which also sees memory that
    compiled libraries allocate for themselves. glibc is told to hand memory back rather than to keep it, or an earlier
    call's memory would hide this one's; a first call warms caches that are not the call's own, unless ``warm`` says
    that there was one.
    """
    if not warm:
        call()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return int(torch.cuda.max_memory_allocated() - before)
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    try:
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(_M_MMAP_THRESHOLD, 1 << 16)
        libc.mallopt(_M_TRIM_THRESHOLD, 1 << 16)
        libc.malloc_trim(0)
        reset.write_text("5")
        before = _kib(status, "VmRSS")
        result = call()
        peak = _kib(status, "VmHWM")
        del result
    except OSError:
        return None
    return max(0, peak - before) * 1024


def _kib(status: Path, field: str) -> int:
    line = next(line for line in status.read_text().splitlines() if line.startswith(field))
    return int(line.split()[1])


@functools.cache
def device_name(kind: str | None = None) -> str:
    """The processor (and instruction set in use) or GPU that results were measured on.

    Args:
        kind: ``cpu`` or ``cuda``; by default the GPU where there is one.
    """
    if kind == "cuda" or (kind is None and torch.cuda.is_available()):
        return torch.cuda.get_device_name()
    model = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    return f"{model} [{native.active_cpu_isa() or 'no native library'}]"
