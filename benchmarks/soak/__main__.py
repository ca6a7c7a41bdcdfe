"""Runs the soak: ``python -m benchmarks.soak [--minutes 20] [--seed N] [--write] [--part NAME]``.

Exit code 1 on any failure. ``--write`` puts the record into docs/reliability.md. A failing problem is run again with
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
from benchmarks.soak.parts import HANGS, ROOT, Outcome
from fastxattn.bench.records import device_name, git_sha, versions
from fastxattn.runtime import native

DOC = ROOT / "docs/reliability.md"
MARKS = re.compile(r"(<!-- soak -->\n).*?(<!-- end soak -->)", re.DOTALL)
SMALL_EXCESS = 2.0
"""A result outside its budget by less than this is counted as such and is no failure: near-exact yardsticks make such
results on small problems, and the tests decide about them case by case."""
SHARES = {"cpu": 0.4, "triton": 0.2, "sanitized": 0.2, "ranks": 0.1, "files": 0.1}
"""Of the time."""
PROBLEMS = {"cpu": "CPU kernels", "triton": "Triton, interpreted", "sanitized": "CPU kernels under ASan and UBSan"}


def problems(seconds: float, seed: int, part: str) -> Outcome:
    """Random problems on a backend; a crash loses one problem and goes on with the next."""
    outcome, more, backend = Outcome(), {}, "cpu"
    if part == "triton":
        more, backend = {"TRITON_INTERPRET": "1"}, part
    elif reason := native.cpu_library().reason:
        outcome.skipped = reason
    elif part == "sanitized":
        more, outcome.skipped = parts.sanitizers()
    end = time.monotonic() + seconds
    while not outcome.skipped and time.monotonic() < end:
        command = [sys.executable, "-m", "benchmarks.soak.problems", str(end - time.monotonic()), str(seed), backend]
        code, said, error = _run(command, 2 * seconds + 3600, more)
        begun: dict[str, object] = {}
        for text in said.splitlines():
            line = json.loads(text)
            seed = line["seed"] + 1
            begun = {} if "case" in line else line
            if not begun:
                record(outcome, line)
        if code != 0:
            found = re.search(r".*(runtime error|ERROR: AddressSanitizer).*(\n.*){0,6}", error)  # its stack is long
            outcome.failures.append(f"problem {json.dumps(begun)}: exit {code}: {found[0] if found else error[-1500:]}")
            if not begun:
                break  # it does not even start
    return outcome


def _run(command: list[str], timeout: float, variables: dict[str, str]) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a process on this checkout."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), **variables}
    with subprocess.Popen(
        command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:  # fmt: skip
        try:
            said, error = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            process.kill()
            said, error = process.communicate()
            return HANGS, said, "hangs"
        return process.returncode, said, error


def record(outcome: Outcome, line: dict[str, object]) -> None:
    """Count one judged problem."""
    op, share = str(line["op"]), float(line["share"])  # type: ignore[arg-type]
    outcome.counts[op] += 1
    outcome.spread[str(line["dtype"])] += 1
    if line["isa"] != "-":
        outcome.spread[f"{line['isa']}"] += 1
        outcome.spread[f"{line['threads']} threads"] += 1
    if line["fault"] or share > SMALL_EXCESS:
        outcome.failures.append(f"problem {json.dumps(line)}")
        return
    outcome.worst[op] = max(outcome.worst.get(op, 0.0), share)
    outcome.small += share > 1


def table(outcomes: dict[str, Outcome], minutes: float, seed: int) -> str:
    """The record, as markdown: a row an operation, a column a part; then what else was done."""
    failures = sum(len(o.failures) for o in outcomes.values())
    tried = sum(o.counts.total() for o in outcomes.values())
    lines = [
        f"{datetime.date.today()}: {tried} trials in {minutes:.0f} minutes from seed {seed}, **{failures} failures**. "
        f"{device_name()}; {versions()}; commit {git_sha()}.",
        "",
    ]
    random = {title: outcomes[part] for part, title in PROBLEMS.items() if part in outcomes}
    ops = sorted({op for outcome in random.values() for op in outcome.counts})
    if random:
        lines += [
            "Trials, and in parentheses the largest error as a share of its budget (none where results must be equal).",
            "", f"| operation | {' | '.join(random)} |", f"|---|{'---:|' * len(random)}",
        ]  # fmt: skip
        for op in ops:
            cells = (f"{o.counts[op]} ({o.worst[op]:.2f})" if o.worst.get(op) else str(o.counts[op] or "") for o in
                     random.values())  # fmt: skip
            lines.append(f"| {op} | {' | '.join(cells)} |")
        for title, outcome in random.items():
            said = ", ".join(f"{what} {count}" for what, count in sorted(outcome.spread.items()))
            small = f" {outcome.small} outside their budget by less than a factor of two: counted, not failures."
            not_run = f"not run, {outcome.skipped}."
            lines += ["", f"{title}: {not_run if outcome.skipped else f'{said}.{small if outcome.small else str()}'}"]
        lines.append("")
    others = {name: outcome for name, outcome in outcomes.items() if name not in PROBLEMS}
    if others:
        lines += ["| what else | times |", "|---|---:|"]
        for name, outcome in others.items():
            lines += [f"| {name}: not run, {outcome.skipped} | 0 |"] if outcome.skipped else []
            lines += [f"| {what} | {count} |" for what, count in sorted(outcome.counts.items())]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Command line; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--seed", type=int, default=int(time.time()) % 10**6 * 1000)
    parser.add_argument("--write", action="store_true", help="put the record into docs/reliability.md")
    parser.add_argument("--part", choices=tuple(SHARES), action="append")
    options = parser.parse_args()
    wanted = options.part or list(SHARES)
    whole = sum(SHARES[name] for name in wanted)
    outcomes: dict[str, Outcome] = {}
    for name in wanted:
        seconds = 60 * options.minutes * SHARES[name] / whole
        print(f"soak: {name} for {seconds:.0f} s", flush=True)
        if name in PROBLEMS:
            outcomes[name] = problems(seconds, options.seed, name)
        else:
            outcomes[name] = getattr(parts, name)(seconds, options.seed)
        for failure in outcomes[name].failures:
            print(f"FAILED {failure}", flush=True)
    text = table(outcomes, options.minutes, options.seed)
    print(text)
    if options.write:
        DOC.write_text(MARKS.sub(lambda m: m[1] + text + m[2], DOC.read_text()))
    return 1 if any(o.failures for o in outcomes.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
