"""Runs the soak: ``python -m benchmarks.soak [--minutes 20] [--seed N] [--write] [--part NAME]``.

Exit code 1 on any failure. ``--write`` puts the table into docs/reliability.md. A failing problem is run again with
``python -m benchmarks.soak.problems 0 SEED BACKEND``.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import subprocess
import sys
import time

from benchmarks.soak import parts
from benchmarks.soak.parts import ROOT, Outcome
from fastxattn.bench.records import device_name, git_sha, versions
from fastxattn.runtime import native

DOC = ROOT / "docs/reliability.md"
MARKS = re.compile(r"(<!-- soak -->\n).*?(<!-- end soak -->)", re.DOTALL)
SMALL_EXCESS = 2.0
"""A result outside its budget by less than this is counted as such and is no failure: near-exact yardsticks make such
results on small problems, and the tests decide about them case by case."""


def problems(seconds: float, seed: int, backend: str) -> tuple[Outcome, dict[str, float]]:
    """Random problems on a backend; a crash loses one problem and goes on with the next."""
    outcome, worst, end = Outcome(), {}, time.monotonic() + seconds
    if backend == "cpu" and (reason := native.cpu_library().reason):
        outcome.skipped = reason
        return outcome, {}
    env = {**os.environ, "PYTHONPATH": str(ROOT), **({"TRITON_INTERPRET": "1"} if backend == "triton" else {})}
    while time.monotonic() < end:
        left = str(end - time.monotonic())
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.soak.problems", left, str(seed), backend], cwd=ROOT, env=env,
            capture_output=True, text=True, check=False, timeout=seconds + 600,
        )  # fmt: skip
        begun: dict[str, object] = {}
        for text in done.stdout.splitlines():
            line = json.loads(text)
            seed = line["seed"] + 1
            if "case" not in line:
                begun = line
                continue
            begun = {}
            title = f"{line['op']}, {line['backend']}, {line['dtype']}"
            outcome.counts[title] += 1
            share = line["share"]
            if line["fault"] or share > SMALL_EXCESS:
                outcome.failures.append(f"problem {json.dumps(line)}")
            else:
                worst[title] = max(worst.get(title, 0.0), share)
                outcome.counts["~outside the budget by less than twice"] += share > 1
        if done.returncode != 0:
            outcome.failures.append(f"problem {json.dumps(begun)}: exit {done.returncode}: {done.stderr[-1500:]}")
            if not begun:
                break  # it does not even start
    return outcome, worst


def table(outcomes: dict[str, Outcome], worst: dict[str, float], minutes: float, seed: int) -> str:
    """The record, as markdown."""
    failures = sum(len(o.failures) for o in outcomes.values())
    tried = sum(n for o in outcomes.values() for k, n in o.counts.items() if not k.startswith("~"))
    lines = [
        f"{datetime.date.today()}: {tried} trials in {minutes:.0f} minutes from seed {seed}, **{failures} failures**. "
        f"{device_name()}; {versions()}; commit {git_sha()}.",
        "",
        "| what | trials | largest error / budget |",
        "|---|---:|---:|",
    ]
    for name, outcome in outcomes.items():
        if outcome.skipped:
            lines.append(f"| {name}: not run, {outcome.skipped} | 0 | |")
        for what, count in sorted(outcome.counts.items()):
            if not what.startswith("~"):
                share = f"{worst[what]:.2f}" if worst.get(what) else ""
                lines.append(f"| {what} | {count} | {share} |")
    small = sum(o.counts["~outside the budget by less than twice"] for o in outcomes.values())
    if small:
        lines += ["", f"{small} results were outside their budget by less than a factor of two: counted, not failures."]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Command line; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--seed", type=int, default=int(time.time()) % 10**6 * 1000)
    parser.add_argument("--write", action="store_true", help="put the table into docs/reliability.md")
    parser.add_argument("--part", choices=("cpu", "triton", "sanitized", "ranks", "files"), action="append")
    options = parser.parse_args()
    shares = {"cpu": 0.45, "triton": 0.2, "sanitized": 0.15, "ranks": 0.1, "files": 0.1}
    wanted = options.part or list(shares)
    whole = sum(shares[name] for name in wanted)
    outcomes: dict[str, Outcome] = {}
    worst: dict[str, float] = {}
    for name in wanted:
        seconds = 60 * options.minutes * shares[name] / whole
        print(f"soak: {name} for {seconds:.0f} s", flush=True)
        if name in ("cpu", "triton"):
            outcomes[name], found = problems(seconds, options.seed, name)
            worst |= found
        else:
            outcomes[name] = getattr(parts, name)(seconds, options.seed)
        for failure in outcomes[name].failures:
            print(f"FAILED {failure}", flush=True)
    text = table(outcomes, worst, options.minutes, options.seed)
    print(text)
    if options.write:
        DOC.write_text(MARKS.sub(lambda m: m[1] + text + m[2], DOC.read_text()))
    return 1 if any(o.failures for o in outcomes.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
