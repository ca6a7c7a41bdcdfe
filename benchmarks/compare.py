"""Two sets of results, ratio by ratio; exit 1 where something became slower by more than the noise.

    python -m benchmarks.compare OLD NEW [--tolerance 0.05] [--all]

OLD and NEW are folders of CSVs or commits of this repository. What is compared is the speed-up over the case's rival,
which a change of the machine's mood leaves alone. The noise is read off the rivals: their ratios to each other should
not have changed, so what changed there (nine tenths of it) changed by chance.
"""

from __future__ import annotations

import argparse
import io
import math
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from benchmarks.harness import Record, read_csv

ROOT = Path(__file__).resolve().parents[1]
FOLDER = "benchmarks/results"
Key = tuple[str, str, str, str, int, str, str]


@dataclass(frozen=True)
class Change:
    """One case in both sets."""

    key: Key
    old: Record
    new: Record

    @property
    def ratio(self) -> float:
        """New speed-up / old speed-up: below 1 is slower."""
        return self.new.ratio / self.old.ratio

    @property
    def broke(self) -> bool:
        """Inside its error budget before, and no longer."""
        return self.old.gate == "ok" and self.new.gate != "ok"

    def __str__(self) -> str:
        op, case, direction, dtype, threads, provider, device = self.key
        what = f"{op}: {case}, {direction}, {dtype}, {threads} threads, {provider} on {device}"
        if self.broke:
            return f"{what}: {self.new.gate}"
        return f"{what}: {self.old.ratio:.2f}x -> {self.new.ratio:.2f}x ({self.ratio - 1:+.1%})"


def read(source: str) -> dict[Key, Record]:
    """Rows of every CSV that has the benchmark schema, from a folder or a commit."""
    if Path(source).is_dir():
        return {key(r): r for path in sorted(Path(source).glob("*.csv")) for r in _records(path.read_text())}
    listed = _git("ls-tree", "--name-only", source, f"{FOLDER}/")
    if listed is None:
        raise SystemExit(f"compare: {source!r} is neither a folder nor a commit of this repository")
    names = [name for name in listed.splitlines() if name.endswith(".csv")]
    return {key(r): r for name in names for r in _records(_git("show", f"{source}:{name}") or "")}


def _git(*command: str) -> str | None:
    done = subprocess.run(["git", *command], cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout if done.returncode == 0 else None


def _records(text: str) -> list[Record]:
    if not io.StringIO(text).readline().startswith("op,case,direction,provider,rival,"):
        return []  # another schema: memory, accuracy, offline tables
    with tempfile.NamedTemporaryFile("w", suffix=".csv") as file:
        file.write(text)
        file.flush()
        return read_csv(Path(file.name))


def key(r: Record) -> Key:
    """What makes two rows the same measurement."""
    return r.op, r.case, r.direction, r.dtype, r.threads, r.provider, r.device


def changes(old: dict[Key, Record], new: dict[Key, Record]) -> tuple[list[Change], float]:
    """Compare fastxattn's cases, the worst first; the noise is the 90th percentile of the rivals' own changes."""
    both = [Change(k, old[k], new[k]) for k in new if k in old]
    drift = sorted(
        abs(math.log(c.ratio))
        for c in both
        if c.new.gate == "rival" and c.new.provider != c.new.rival and c.old.ratio > 0 and c.new.ratio > 0
    )
    noise = statistics.quantiles(drift, n=10)[-1] if len(drift) > 1 else (drift or [0.0])[0]
    cases = [c for c in both if c.new.gate != "rival" and (c.broke or math.isfinite(c.ratio))]
    return sorted(cases, key=lambda c: -math.inf if c.broke else c.ratio), math.expm1(noise)


def main(arguments: list[str] | None = None) -> int:
    """Print what changed; 1 when something is worse."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", help="folder of CSVs, or a commit")
    parser.add_argument("new", help="folder of CSVs, or a commit")
    parser.add_argument("--tolerance", type=float, default=0.05, help="smallest loss that counts, whatever the noise")
    parser.add_argument("--all", action="store_true", help="print what did not change, too")
    options = parser.parse_args(arguments)
    old, new = read(options.old), read(options.new)
    cases, noise = changes(old, new)
    limit = max(options.tolerance, noise)
    machines = {c.old.device for c in cases} | {c.new.device for c in cases}
    if len(machines) > 1:
        print(f"note: measured on different machines: {', '.join(sorted(machines))}")
    worse = [c for c in cases if c.broke or c.ratio < 1 / (1 + limit)]
    better = [c for c in cases if not c.broke and c.ratio > 1 + limit]
    for title, group in (("worse", worse), ("better", better)):
        for change in group:
            print(f"{title:<7} {change}")
    if options.all:
        for change in cases:
            if change not in worse and change not in better:
                print(f"same    {change}")
    print(
        f"{len(cases)} cases in both: {len(worse)} worse, {len(better)} better; noise {noise:.1%}, limit {limit:.1%}; "
        f"only old: {len(set(old) - set(new))} rows, only new: {len(set(new) - set(old))}"
    )
    return 1 if worse else 0


if __name__ == "__main__":
    sys.exit(main())
