"""Runs benchmark files one after another within a time limit: what ``fastxattn bench`` does."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.harness.records import Record, read_csv

ROOT = Path(__file__).resolve().parents[2]
FULL = {"pruning": ["--full", "--models", "both"], "models": []}
"""Options that make a file run every case it has, where ``--full`` alone does not."""
QUICK = {"models": ["--stalest", "--seconds", "4"]}
"""Whole models: as many rows as there is time for, those first that are missing or were measured longest ago."""
SLOW = ("contrastive", "absorbed_attention", "models")
"""Files whose cases take longest come last and get the time that the others did not use."""
ENDING = 10
"""Seconds kept for what comes after the last file."""


@dataclass(frozen=True)
class Outcome:
    """What a run measured."""

    seconds: float
    left_out: dict[str, list[str]]
    """Titles of the cases that there was no time for, by file."""
    results: dict[str, list[Record]]

    def __str__(self) -> str:
        missed = [
            f"{name}: {len(titles)} ({titles[0]}{', ...' * (len(titles) > 1)})"
            for name, titles in self.left_out.items()
            if titles
        ]
        rest = f"no time for {'; '.join(missed)}" if missed else "nothing left out"
        return f"took {self.seconds / 60:.1f} minutes; {rest}"


def run_suite(
    names: Sequence[str],
    *,
    full: bool,
    minutes: float | None,
    quiet: bool,
    report: Callable[[str], object] = print,
) -> Outcome:
    """Run the named benchmark files, or all of them; each file gets an equal share of the remaining time.

    Args:
        names: of ``bench_<name>.py`` files; all when empty.
        full: more shapes, slower rivals, every whole model.
        minutes: time limit; by default 10, or none when ``full``.
        quiet: send the files' tables to stderr.
        report: called with a line when a file begins.

    Raises:
        ValueError: there is no such file.
        RuntimeError: a file failed.
    """
    began = time.time()
    known = sorted(path.stem.removeprefix("bench_") for path in (ROOT / "benchmarks").glob("bench_*.py"))
    for name in names:
        if name not in known:
            raise ValueError(f"NAME must be one of {', '.join(known)}; got {name!r}")
    chosen = sorted(names or known, key=lambda name: SLOW.index(name) if name in SLOW else -1)
    end = began + 60 * (minutes or (math.inf if full else 10)) - ENDING
    left_out: dict[str, list[str]] = {}
    for place, name in enumerate(chosen):
        share = (end - time.time()) / (len(chosen) - place)
        if share <= 0:
            left_out[name] = ["everything"]
            continue
        more = FULL.get(name, ["--full"]) if full else QUICK.get(name, [])
        report(f"{name}, {place + 1} of {len(chosen)}, for at most {share:.0f} s")
        left_out[name] = _run_file(name, more, share, quiet)
    files = (ROOT / f"benchmarks/results/{name}.csv" for name in chosen)
    return Outcome(time.time() - began, left_out, {file.stem: read_csv(file) for file in files if file.exists()})


def _run_file(name: str, more: Sequence[str], seconds: float, quiet: bool) -> list[str]:
    """Run one benchmark file for at most ``seconds``; the titles of the cases it did not measure."""
    with tempfile.TemporaryDirectory() as folder:
        left = Path(folder) / "left"
        env = {**os.environ, "FASTXATTN_BENCH_LEFT": str(left)}
        if math.isfinite(seconds):
            env["FASTXATTN_BENCH_UNTIL"] = str(time.time() + seconds)
        command = [sys.executable, "-m", f"benchmarks.bench_{name}", *more]
        with subprocess.Popen(command, cwd=ROOT, stdout=sys.stderr if quiet else None, env=env) as process:
            try:
                code = process.wait(seconds + ENDING / 2 if math.isfinite(seconds) else None)
            except subprocess.TimeoutExpired:  # one call outlasted the limit; the rows before it are written
                process.kill()
                code = 0
        if code != 0:
            raise RuntimeError(f"benchmark {name} ended with exit code {code}")
        return left.read_text().splitlines() if left.exists() else ["everything"]
