"""Interleaved timing of rivals in one process on the same data."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch


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
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Timing]:
    """Time every provider in turn, ``rounds`` times over, the order rotating from round to round.

    Each entry is the mean of as many calls as fill ``min_seconds``, so that microsecond calls are measurable.
    ``clock=time.process_time``, on one thread, measures what a call takes of a processor that other work shares.
    """
    repeats: dict[str, int] = {}
    for name, call in providers.items():
        call()
        _synchronize()
        start = clock()
        call()
        _synchronize()
        repeats[name] = max(1, round(min_seconds / max(clock() - start, 1e-7)))
    names, taken = list(providers), {name: [] for name in providers}  # type: ignore[var-annotated]
    for i in range(rounds):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            call = providers[name]
            _synchronize()
            start = clock()
            for _ in range(repeats[name]):
                call()
            _synchronize()
            taken[name].append((clock() - start) / repeats[name])
    return {name: Timing(tuple(values)) for name, values in taken.items()}
