"""Random cells of the composition table, with inputs of other seeds than the tests': results stay right or refused.

``python -m benchmarks.soak.compositions [--seconds 60] [--seed N]`` prints what was wrong; exit code 1 if anything was.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
import warnings

from benchmarks.soak.parts import Outcome
from tests.compositions import row, table
from tests.compositions.columns import COLUMNS
from tests.compositions.judge import judge, outcome
from tests.compositions.rows import ROWS


def compositions(seconds: float, seed: int) -> Outcome:
    """Random rows, columns and inputs, for so long."""
    found, r, end = Outcome(), random.Random(seed), time.monotonic() + seconds
    cells = [(one.name, column) for one in ROWS for column in COLUMNS if table.applies(one, column)]
    warnings.simplefilter("ignore")
    while time.monotonic() < end or not found.counts:
        name, column = r.choice(cells)
        row.Make.shift = r.randrange(1, 1 << 30)
        try:
            fault = judge(name, column, outcome(COLUMNS[column], name))
        finally:
            shift, row.Make.shift = row.Make.shift, 0
        found.counts["cell of the composition table"] += 1
        if fault:
            found.failures.append(f"inputs {shift}: {fault}")
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    options = parser.parse_args()
    done = compositions(options.seconds, options.seed)
    print(*done.failures, f"{done.counts.total()} cells, {len(done.failures)} wrong", sep="\n")
    sys.exit(1 if done.failures else 0)
