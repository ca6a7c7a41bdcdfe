"""Random problems for so many seconds: ``python -m benchmarks.soak.problems SECONDS SEED BACKEND``.

A process of its own, so that a crash is a finding too: it writes a line for each problem before it runs, and one after.
The trial of a seed depends on the seed alone; SECONDS 0 runs that seed and nothing else.
"""

from __future__ import annotations

import json
import random
import sys
import time

import torch

from benchmarks.soak.trials import DTYPES, MAKERS, judge, judge_attention
from fastxattn.runtime import native


def one(seed: int, backend: str) -> dict[str, object]:
    """Make and judge the trial of ``seed``."""
    r = random.Random(seed)
    dtype, threads = r.choice(DTYPES), r.choice((1, 2, 3, 4))
    isa = r.choice(native.available_cpu_isas()) if backend == "cpu" else "-"
    op = "attention" if backend == "triton" or r.random() < 0.3 else r.choice(list(MAKERS))
    line = {
        "seed": seed, "op": op, "backend": backend, "isa": isa, "threads": threads,
        "dtype": str(dtype).removeprefix("torch."),
    }  # fmt: skip
    print(json.dumps(line), flush=True)
    torch.set_num_threads(threads)
    if backend == "cpu":
        native.force_cpu_isa(isa)
    try:
        if op == "attention":
            case, found = judge_attention(r, dtype, backend)
        else:
            trial = MAKERS[op](r, torch.Generator().manual_seed(seed), dtype)
            case, found = trial.case, judge(trial, backend)
    except Exception as error:  # whatever it is, the seed belongs in the record
        return {**line, "case": "", "fault": f"{type(error).__name__}: {error}", "share": None}
    share = found.error / found.budget if found.budget else float(found.error > 0)
    return {
        **line, "case": case, "result": found.result, "error": found.error, "budget": found.budget, "share": share,
        "fault": found.fault,
    }  # fmt: skip


def main() -> None:
    """Command line; see the module's docstring."""
    seconds, seed, backend = float(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    end = time.monotonic() + seconds
    while True:
        print(json.dumps(one(seed, backend)), flush=True)
        seed += 1
        if time.monotonic() >= end:
            return


if __name__ == "__main__":
    main()
