"""Measured facts: ``bench`` runs a checkout's benchmarks, ``report`` makes one page of their results."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

import typer

from fastxattn.cli.common import Json, app, checkout, emit, working

# How a benchmark is asked for everything it has.
FULL = {"pruning": ["--full", "--models", "both"], "models": []}
# Whole models: as many rows as there is time for, those first that are missing or were measured longest ago.
QUICK = {"models": ["--stalest", "--seconds", "4"]}
SLOW = ("contrastive", "absorbed_attention", "models")
"""Rooms whose cases take longest come last, and get the time that the others left."""
ENDING = 10
"""Seconds for what comes after the rooms."""


@app.command(epilog="Example: fastxattn bench attention contrastive")
def bench(
    names: Annotated[list[str] | None, typer.Argument(help="attention, contrastive, ...; all if none is named")] = None,
    full: Annotated[bool, typer.Option("--full", help="more shapes, slower rivals, every whole model")] = False,
    minutes: Annotated[float | None, typer.Option(help="end after this long; 10 without --full")] = None,
    as_json: Json = False,
) -> None:
    """Run the benchmarks of a source checkout: CSVs in benchmarks/results, tables here, charts in docs/images.

    The time is shared out among the rooms, and in a room among its cases. What there was no time for is named last.
    """
    root, began = checkout(), time.time()
    known = sorted(p.stem.removeprefix("bench_") for p in (root / "benchmarks").glob("bench_*.py"))
    for name in names or ():
        if name not in known:
            raise typer.BadParameter(f"must be one of {', '.join(known)}; got {name!r}")
    chosen = sorted(names or known, key=lambda name: SLOW.index(name) if name in SLOW else -1)
    end = began + 60 * (minutes or (10 if not full else math.inf)) - ENDING
    left_out: dict[str, list[str]] = {}
    for place, name in enumerate(chosen):
        share = (end - time.time()) / (len(chosen) - place)
        if share <= 0:
            left_out[name] = ["everything"]
            continue
        more = FULL.get(name, ["--full"]) if full else QUICK.get(name, [])
        typer.echo(f"{name}, {place + 1} of {len(chosen)}, for at most {share:.0f} s", err=True)
        left_out[name] = _room(root, name, more, share, as_json)
    took = time.time() - began
    if as_json:
        from fastxattn.bench import read_csv

        files = [root / f"benchmarks/results/{name}.csv" for name in chosen]
        rows = {f.stem: read_csv(f) for f in files if f.exists()}
        emit({"seconds": took, "left_out": left_out, "results": rows}, True)
        return
    missed = [
        f"{name}: {len(titles)} ({titles[0]}{', ...' * (len(titles) > 1)})"
        for name, titles in left_out.items()
        if titles
    ]
    typer.echo(f"took {took / 60:.1f} minutes; {'no time for ' + '; '.join(missed) if missed else 'nothing left out'}")


def _room(root: Path, name: str, more: list[str], seconds: float, to_stderr: bool) -> list[str]:
    """Run one benchmark file for at most so long; what it did not measure."""
    with tempfile.TemporaryDirectory() as folder:
        left = Path(folder) / "left"
        env = {**os.environ, "FASTXATTN_BENCH_LEFT": str(left)}
        if math.isfinite(seconds):
            env["FASTXATTN_BENCH_UNTIL"] = str(time.time() + seconds)
        command = [sys.executable, "-m", f"benchmarks.bench_{name}", *more]
        with subprocess.Popen(command, cwd=root, stdout=sys.stderr if to_stderr else None, env=env) as process:
            try:
                code = process.wait(seconds + ENDING / 2 if math.isfinite(seconds) else None)
            except subprocess.TimeoutExpired:  # a single call takes longer than there is: its rows so far are written
                process.kill()
                code = 0
        if code != 0:
            raise RuntimeError(f"benchmark {name} ended with exit code {code}")
        return left.read_text().splitlines() if left.exists() else ["everything"]


@app.command(epilog="Example: fastxattn report --out report.html")
def report(
    results: Annotated[
        Path | None, typer.Option(help="folder of CSVs; a checkout's benchmarks/results by default")
    ] = None,
    out: Annotated[Path, typer.Option(help="the page to write")] = Path("build/report.html"),
    as_json: Json = False,
) -> None:
    """One self-contained page of every result: speed, memory, accuracy, errors, machine and versions."""
    from fastxattn.bench.page import write_page

    folder = results or checkout() / "benchmarks/results"
    with working("drawing"):
        page = write_page(folder, out)
    emit(page, as_json)
