"""The command line that every benchmark file shares."""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from benchmarks.harness import Case, Record, read_csv, run_cases, write_csv
from benchmarks.harness.report import plot_ratios, print_table

RESULTS = Path(__file__).parent / "results"
IMAGES = Path(__file__).parents[1] / "docs/images"


def nbytes(*tensors: torch.Tensor) -> float:
    """Bytes of all of them together, for ``Workload.bytes``."""
    return float(sum(t.nbytes for t in tensors))


def parser(rounds: int = 11) -> argparse.ArgumentParser:
    """The options that every benchmark file has."""
    found = argparse.ArgumentParser()
    found.add_argument("--match", default="", help="run only cases whose title contains this")
    found.add_argument("--full", action="store_true", help="more shapes, slower rivals")
    found.add_argument("--rounds", type=int, default=rounds, help="interleaved rounds per case")
    found.add_argument("--seconds", type=float, default=10, help="time for a case's rounds, without --full")
    found.add_argument("--threads", type=int, default=torch.get_num_threads())
    found.add_argument("--no-save", action="store_true", help="print only")
    return found


def run(
    name: str,
    cases: Iterable[Case],
    options: argparse.Namespace,
    adapt: Callable[[Record], Record] = lambda r: r,
    clock: Callable[[], float] = time.perf_counter,
) -> list[Record]:
    """Run a registry of cases, and write each one's rows to ``results/<name>.csv`` when it is done."""
    torch.set_num_threads(options.threads)

    def keep(records: list[Record]) -> None:
        if not options.no_save:
            write_csv(RESULTS / f"{name}.csv", [adapt(r) for r in records])

    seconds = math.inf if options.full else options.seconds
    records = run_cases(cases, rounds=options.rounds, match=options.match, max_seconds=seconds, clock=clock, keep=keep)
    if records:
        print_table(records, f"{name}, {options.threads} threads")
    return records


def main(name: str, cases: Callable[[bool], Iterable[Case]], provider: str = "fastxattn cpu") -> None:
    """Command line of a file: run its cases, print their table and draw the chart of everything in the CSV."""
    options = parser().parse_args()
    records = run(name, cases(options.full), options)
    if records and not options.no_save:
        found = read_csv(RESULTS / f"{name}.csv")
        devices = ", ".join(dict.fromkeys(r.device for r in found))
        plot_ratios(found, provider, IMAGES / f"{name}.png", f"{name}: {devices}")
