"""Benchmark cases and the loop that runs them: check first, then time, then one CSV row per provider."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.harness.device import on_device
from benchmarks.harness.records import Record
from benchmarks.harness.roofline import measure_peak
from fastxattn.runtime.timing import OutOfTime, device_name, interleaved


@dataclass(frozen=True)
class Workload:
    """Built inputs of one case: what to time, and the check without which no speed is reported."""

    providers: Mapping[str, Callable[[], object]]
    rival: str
    """The provider ratios are taken against: the strongest honest one."""
    check: Callable[[], str]
    """Returns "ok", or why the result is outside its error budget."""
    flops: float = 0.0
    """Useful floating-point operations of one call."""
    bytes: float = 0.0
    """Useful bytes of one call, every input read once and every result written once: what bounds an operation that
    computes little."""


@dataclass(frozen=True)
class Case:
    """A named case; ``build`` makes its inputs, so that a registry of many costs no memory."""

    op: str
    name: str
    direction: str  # forward | forward+backward
    dtype: torch.dtype
    build: Callable[[], Workload]
    device: str = "cpu"
    """Where its work is done, ``cpu`` or ``cuda``."""

    @property
    def title(self) -> str:
        """One-line name for tables and progress bars."""
        return f"{self.name} {self.direction} {str(self.dtype).removeprefix('torch.')}"


def run_case(
    case: Case,
    *,
    rounds: int = 11,
    max_seconds: float = math.inf,
    deadline: float = math.inf,
    clock: Callable[[], float] = time.perf_counter,
) -> list[Record]:
    """Check and time one case. A failing check yields rows without times for fastxattn.

    Args:
        case: what to run.
        rounds: how often every provider is timed.
        max_seconds: no new round begins after so long, except that there are at least three.
        deadline: see :func:`fastxattn.runtime.timing.interleaved`.
        clock: what time is taken with, see :func:`fastxattn.runtime.timing.interleaved`.
    """
    workload = case.build()
    gate = workload.check()
    peak = measure_peak(case.dtype, case.device)
    on_gpu = case.device == "cuda"
    timings = (
        on_device(workload.providers, rounds=rounds)
        if on_gpu
        else interleaved(workload.providers, rounds=rounds, max_seconds=max_seconds, deadline=deadline, clock=clock)
    )
    rival = timings[workload.rival]
    records = []
    for name, timing in timings.items():
        ours = name.startswith("fastxattn")
        failed = ours and gate != "ok"
        share, bound = peak.share(workload.flops, workload.bytes, timing.median)
        records.append(
            Record(
                op=case.op,
                case=case.name,
                direction=case.direction,
                provider=name,
                rival=workload.rival,
                dtype=str(case.dtype).removeprefix("torch."),
                threads=0 if on_gpu else torch.get_num_threads(),
                median_ms=float("nan") if failed else timing.median * 1e3,
                ratio=float("nan") if failed else timing.ratio_to(rival),
                gflops=float("nan") if failed else workload.flops / timing.median / 1e9,
                gate=gate if ours else "rival",
                device=device_name(case.device),
                roofline=math.nan if failed else share,
                bound=bound,
                peak_gflops=peak.gflops,
                peak_gbytes=peak.gbytes,
            )
        )
    return records


def run_cases(
    cases: Iterable[Case],
    *,
    rounds: int = 11,
    match: str = "",
    max_seconds: float = math.inf,
    clock: Callable[[], float] = time.perf_counter,
    keep: Callable[[list[Record]], object] = lambda records: None,
) -> list[Record]:
    """Run every case whose title contains ``match``, with a progress bar; ``keep`` gets each one's rows at once.

    The time until the moment in the environment variable FASTXATTN_BENCH_UNTIL (seconds since 1970) is shared out
    among the cases; one that cannot end by then is left out, and what was left out is said. See :class:`Pending`.
    Float32 comes first: where a processor has no 16-bit products, eager PyTorch takes a hundred times longer in them.
    """
    from rich.progress import track

    until = float(os.environ.get("FASTXATTN_BENCH_UNTIL", "inf"))
    chosen = [case for case in cases if match in f"{case.op} {case.title}"]
    chosen.sort(key=lambda case: case.dtype is not torch.float32)
    pending = Pending(case.title for case in chosen)
    records: list[Record] = []
    for case in track(chosen, description="benchmarks"):
        share = (until - time.time()) / len(pending.waiting)
        try:
            if share <= 0:
                raise OutOfTime
            limit = min(max_seconds, share)
            found = run_case(case, rounds=rounds, max_seconds=limit, deadline=until, clock=clock)
        except OutOfTime:
            pending.leave_out(case.title)
            continue
        pending.done(case.title)
        keep(found)
        records += found
    if pending.left_out:
        print(f"out of time, not measured: {'; '.join(pending.left_out)}")
    return records


class Pending:
    """Titles of the cases not measured yet; the file that FASTXATTN_BENCH_LEFT names always holds them, one a line.

    ``fastxattn bench`` reads it when a benchmark file's process has ended or was killed.
    """

    def __init__(self, titles: Iterable[str]) -> None:
        self.waiting, self.left_out = list(titles), list[str]()
        self._write()

    def done(self, title: str) -> None:
        """The case of this title is measured."""
        self.waiting.remove(title)
        self._write()

    def leave_out(self, title: str) -> None:
        """There is no time for it."""
        self.waiting.remove(title)
        self.left_out.append(title)
        self._write()

    def _write(self) -> None:
        if path := os.environ.get("FASTXATTN_BENCH_LEFT"):
            Path(path).write_text("".join(f"{title}\n" for title in self.left_out + self.waiting))
