"""Random problems for so many seconds: ``python -m benchmarks.soak.problems SECONDS SEED BACKEND``.

BACKEND is ``cpu``, ``triton`` or ``options``: small problems with all options on the CPU kernels.

A process of its own, so that a crash is a finding too: it writes a line for each problem before it runs, and one after.
The trial of a seed depends on the seed and the backend alone; SECONDS 0 runs that seed and nothing else. A library in
FASTXATTN_SOAK_LIBRARY, a folder, takes the place of the installed one: how the sanitizers' build is run.
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
from pathlib import Path

import torch

from benchmarks.soak.makers import MAKERS, NO_TRITON, OPTIONS
from benchmarks.soak.trials import DTYPES, Draw, judge, judge_attention
from fastxattn.runtime import native

ATTENTION = 0.25
"""Share of the problems that are attention's: it has the most kernels."""


def one(seed: int, part: str) -> dict[str, object]:
    """Make and judge the trial of ``seed``."""
    r, small = random.Random(seed), part == "options"
    makers, backend = (OPTIONS, "cpu") if small else (MAKERS, part)
    dtype, threads = r.choice(DTYPES), 1 if small else r.choice((1, 2, 3, 4))  # few rows are one thread's work
    isa = r.choice(native.available_cpu_isas()) if backend == "cpu" else "-"
    ops = [op for op in makers if backend != "triton" or op not in NO_TRITON]
    op = "attention" if not small and r.random() < ATTENTION else r.choice(ops)
    line = {
        "seed": seed,
        "op": op,
        "backend": backend,
        "isa": isa,
        "threads": threads,
        "dtype": str(dtype).removeprefix("torch."),
    }
    print(json.dumps(line), flush=True)
    torch.set_num_threads(threads)
    if backend == "cpu":
        native.force_cpu_isa(isa)
    draw = Draw(r.randrange(1 << 30), dtype, backend)
    try:
        if op == "attention":
            case, found = judge_attention(draw, backend)
        else:
            trial = makers[op](draw)
            case, found = trial.case, judge(trial, backend)
    except Exception as error:  # whatever it is, the seed belongs in the record
        return {**line, "case": "", "fault": f"{type(error).__name__}: {error}", "share": 0.0}
    share = found.error / found.budget if found.budget else 0.0  # no budget: results that have to be equal
    return {
        **line,
        "case": case,
        "result": found.result,
        "error": found.error,
        "budget": found.budget,
        "share": share,
        "fault": found.fault,
    }


def main() -> None:
    """Command line; see the module's docstring."""
    seconds, seed, backend = float(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    if folder := os.environ.get("FASTXATTN_SOAK_LIBRARY"):
        native.LIBRARY_DIR = Path(folder)
        if reason := native.cpu_library().reason:
            sys.exit(reason)
    end = time.monotonic() + seconds
    while True:
        print(json.dumps(one(seed, backend)), flush=True)
        seed += 1
        if time.monotonic() >= end:
            return


if __name__ == "__main__":
    main()
