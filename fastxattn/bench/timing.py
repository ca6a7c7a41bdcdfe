"""Interleaved timing of rivals in one process on the same data."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch


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


_CACHE_BYTES = 1 << 28  # more than any GPU's L2 cache
_CLOCK_HZ = 2e9  # about; a delay need not be exact


def on_device(providers: Mapping[str, Callable[[], object]], *, rounds: int = 11) -> dict[str, Timing]:
    """Time every provider on the GPU in turn, ``rounds`` times over: what the device takes for one call.

    Before each call the L2 cache is overwritten, and the device is kept busy until the host has issued the whole call:
    what the host takes is no part of it (see :func:`host_seconds`).
    """
    scratch = torch.empty(_CACHE_BYTES, dtype=torch.int8, device="cuda")
    delays = {}
    for name, call in providers.items():
        call()  # compiles
        delays[name] = int((2 * host_seconds(call) + 1e-4) * _CLOCK_HZ)
    names = list(providers)
    taken: dict[str, list[float]] = {name: [] for name in names}
    for i in range(rounds):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            scratch.zero_()
            torch.cuda._sleep(delays[name])  # type: ignore[no-untyped-call]
            start.record()
            providers[name]()
            end.record()
            end.synchronize()
            taken[name].append(start.elapsed_time(end) / 1e3)
    return {name: Timing(tuple(values)) for name, values in taken.items()}


def host_seconds(call: Callable[[], object], calls: int = 5) -> float:
    """Median seconds until a call that works on the GPU has returned to the host, with nothing queued before it."""
    taken = []
    for _ in range(calls):
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        taken.append(time.perf_counter() - start)
    torch.cuda.synchronize()
    return statistics.median(taken)
