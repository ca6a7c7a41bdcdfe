"""The command line that every benchmark file shares."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from fastxattn.bench import Case, read_csv, run_cases, write_csv
from fastxattn.bench.report import plot_ratios, print_table

RESULTS = Path(__file__).parent / "results"
IMAGES = Path(__file__).parents[1] / "docs/images"


def main(name: str, cases: Callable[[bool], Iterable[Case]], provider: str = "fastxattn cpu") -> None:
    """Run a registry of cases, write ``results/<name>.csv``, print its table and draw its chart."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--match", default="", help="run only cases whose title contains this")
    parser.add_argument("--full", action="store_true", help="more shapes, slower rivals")
    parser.add_argument("--rounds", type=int, default=11, help="interleaved rounds per case")
    parser.add_argument("--seconds", type=float, default=10, help="time for a case's rounds, without --full")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--no-save", action="store_true", help="print only")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    seconds = math.inf if options.full else options.seconds
    records = run_cases(cases(options.full), rounds=options.rounds, match=options.match, max_seconds=seconds)
    if not records:
        return
    print_table(records, f"{name}, {options.threads} threads")
    if not options.no_save:
        write_csv(RESULTS / f"{name}.csv", records)
        records = read_csv(RESULTS / f"{name}.csv")
        devices = ", ".join(dict.fromkeys(r.device for r in records))
        plot_ratios(records, provider, IMAGES / f"{name}.png", f"{name}: {devices}")
