"""Runs the soak: ``python -m benchmarks.soak [--minutes 20] [--seed N] [--write] [--part NAME]``.

Exit code 1 on any failure. ``--write`` puts the record into docs/design/reliability.md. A failing problem is run
again with ``python -m benchmarks.soak.problems 0 SEED BACKEND``.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import re
import sys
import time

from benchmarks.harness.records import git_sha, versions
from benchmarks.soak import parts
from benchmarks.soak.parts import ROOT, Outcome
from fastxattn.runtime import native
from fastxattn.runtime.timing import device_name

DOC = ROOT / "docs/design/reliability.md"
MARKS = re.compile(r"(<!-- soak -->\n).*?(<!-- end soak -->)", re.DOTALL)
LIMIT = 4.0
"""A result outside its budget by less than this is counted as such and is no failure. Of thousands of problems some are
outside by luck: numbers of one row err together, and a long sum that cancels may fall on the right float in the
yardstick. What is wrong is wrong by far more."""
SHARES = {
    "ranks": 0.1,
    "files": 0.1,
    "options": 0.2,
    "compositions": 0.05,
    "hostile": 0.1,
    "launches": 0.05,
    "triton": 0.15,
    "sanitized": 0.15,
    "cpu": 0.15,
}
"""Of the time. What takes longest a piece comes first; each part shares out what is left."""
LONGEST = 300.0
"""Seconds that one problem may take before it counts as hanging."""
PROBLEMS = {
    "cpu": "CPU kernels",
    "options": "CPU kernels, all options",
    "triton": "Triton, interpreted",
    "sanitized": "CPU kernels under ASan and UBSan",
}
COUNTED = {"hostile": "hostile call", "launches": "launch with wrong integers"}
"""Parts that count what they tried, and what that is."""


def environment(part: str) -> tuple[dict[str, str], str]:
    """Environment variables of a part's processes, and why it cannot run. Compiles what it needs."""
    needs = {"triton": "triton", "launches": "triton", "files": "onnxruntime"}.get(part)
    if needs is not None:
        missing = importlib.util.find_spec(needs) is None
        return {"TRITON_INTERPRET": "1"} if needs == "triton" else {}, f"{needs} is not installed" if missing else ""
    if part in (*PROBLEMS, "hostile") and (reason := native.cpu_library().reason):
        return {}, reason
    return parts.sanitizers() if part in ("sanitized", "hostile") else ({}, "")


def problems(seconds: float, seed: int, part: str, more: dict[str, str]) -> Outcome:
    """Random problems on a backend, or what COUNTED names; a crash loses one seed and goes on with the next."""
    outcome = Outcome()
    module, *options = [part] if part in COUNTED else ["problems", "cpu" if part == "sanitized" else part]
    end = time.monotonic() + seconds
    left = seconds
    while left > 0 or not (outcome.counts or outcome.failures):
        left = max(left, 0.0)
        command = [sys.executable, "-m", f"benchmarks.soak.{module}", str(left), str(seed), *options]
        code, said, error = parts.run(command, left + LONGEST, more)
        begun: dict[str, object] = {}
        for text in said.splitlines():
            line = json.loads(text)
            seed = line["seed"] + 1
            begun = {} if "case" in line or "counts" in line else line
            if "case" in line:
                record(outcome, line)
            for what, count in line.get("counts", {}).items():
                outcome.counts[f"{COUNTED[part]} of {what}"] += count
                if "isa" in line:
                    outcome.counts[f"{COUNTED[part]} on {line['isa']}"] += count
        if code != 0:
            found = re.search(r".*(runtime error|ERROR: AddressSanitizer).*(\n.*){0,6}", error)  # its stack is long
            outcome.failures.append(f"problem {json.dumps(begun)}: exit {code}: {found[0] if found else error[-1500:]}")
            if not begun:
                break  # it does not even start
        left = end - time.monotonic()
    return outcome


def record(outcome: Outcome, line: dict[str, object]) -> None:
    """Count one judged problem."""
    op, share = str(line["op"]), float(line["share"])  # type: ignore[arg-type]
    outcome.counts[op] += 1
    outcome.spread[str(line["dtype"])] += 1
    if line["isa"] != "-":
        outcome.spread[f"{line['isa']}"] += 1
        outcome.spread[f"{line['threads']} threads"] += 1
    if line["fault"] or share > LIMIT:
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
            "",
            f"| operation | {' | '.join(random)} |",
            f"|---|{'---:|' * len(random)}",
        ]
        for op in ops:
            cells = (
                f"{o.counts[op]} ({o.worst[op]:.2f})" if o.worst.get(op) else str(o.counts[op] or "")
                for o in random.values()
            )
            lines.append(f"| {op} | {' | '.join(cells)} |")
        for title, outcome in random.items():
            said = ", ".join(f"{what} {count}" for what, count in sorted(outcome.spread.items()))
            small = f" {outcome.small} outside their budget by less than {LIMIT:.0f} times: counted, not failures."
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
    parser.add_argument("--write", action="store_true", help="put the record into docs/design/reliability.md")
    parser.add_argument("--part", choices=tuple(SHARES), action="append")
    options = parser.parse_args()
    wanted = [name for name in SHARES if name in (options.part or SHARES)]
    settings = {name: environment(name) for name in wanted}  # a build does not count as time
    outcomes = {name: Outcome(skipped=skipped) for name, (_, skipped) in settings.items() if skipped}
    parts_left = [name for name in wanted if name not in outcomes]
    begun = time.monotonic()
    while parts_left:
        left = begun + 60 * options.minutes - time.monotonic()
        seconds = left * SHARES[parts_left[0]] / sum(SHARES[name] for name in parts_left)
        name = parts_left.pop(0)
        print(f"soak: {name} for {seconds:.0f} s", flush=True)
        if name in (*PROBLEMS, *COUNTED):
            outcomes[name] = problems(seconds, options.seed, name, settings[name][0])
        else:
            outcomes[name] = getattr(parts, name)(seconds, options.seed)
        for failure in outcomes[name].failures:
            print(f"FAILED {failure}", flush=True)
    text = table(outcomes, (time.monotonic() - begun) / 60, options.seed)
    print(text)
    if options.write:
        DOC.write_text(MARKS.sub(lambda m: m[1] + text + m[2], DOC.read_text()))
    return 1 if any(o.failures for o in outcomes.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
