"""Errors of every operation, backend and dtype beside their budget: ``python -m benchmarks.errors``.

Writes benchmarks/results/errors.csv from the attention contract's cases and from fixed random problems of the other
operations (those of the soak), for the report. ``bound`` says which budget it is: the tests', or the wider one that the
soak holds operations without an eager twin to.
"""

from __future__ import annotations

import csv
import functools
import random
from collections.abc import Iterator

import torch

from benchmarks.common import RESULTS
from benchmarks.harness.records import git_sha, versions
from benchmarks.soak.trials import DTYPES, MAKERS, judge
from fastxattn.ops.attention import backends
from fastxattn.runtime.timing import device_name
from fastxattn.testing import attention as contract
from fastxattn.testing import measure_error

SEEDS = range(6)
Row = tuple[str, str, str, str, str, str, float, float]


def attention(backend: str) -> Iterator[Row]:
    """Every result and gradient of every case of the contract."""
    for case in contract.ATTENTION_CASES:
        for dtype in DTYPES:
            problem = case.problem(dtype)
            ours = contract.results(functools.partial(backends.run_on, backend), problem)
            truth, eager = contract.expectations(problem)
            for name, value in ours.items():
                found = measure_error(name, value, truth[name], eager[name], backward=name.startswith("grad"))
                kind = str(dtype).removeprefix("torch.")
                yield "attention", backend, kind, str(case), name, "tests", found.max_error, found.max_budget


def others(backend: str) -> Iterator[Row]:
    """The worst result of each fixed random problem."""
    for op, make in MAKERS.items():
        for dtype in DTYPES:
            for seed in SEEDS:
                trial = make(random.Random(seed), torch.Generator().manual_seed(seed), dtype)
                found = judge(trial, backend)
                if not trial.exact:
                    kind = str(dtype).removeprefix("torch.")
                    yield op, backend, kind, trial.case, found.result, "soak", found.error, found.budget


def main() -> None:
    """Write the CSV."""
    where = (device_name(), versions(), git_sha())
    with (RESULTS / "errors.csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        columns = ("op", "backend", "dtype", "case", "result", "bound", "max_error", "budget")
        writer.writerow([*columns, "device", "versions", "git_sha"])
        for row in (*attention("cpu"), *others("cpu")):
            writer.writerow([*row[:6], f"{row[6]:.4g}", f"{row[7]:.4g}", *where])
            file.flush()


if __name__ == "__main__":
    main()
