"""Measured facts: ``bench`` runs a checkout's benchmarks, ``report`` makes one page of their results."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from fastxattn.cli.common import Json, app, checkout, emit, working

# How a benchmark is asked for everything it has. Whole models always take their time: left out unless asked for.
FULL = {"pruning": ["--models", "both"], "models": []}
SLOW = ("models",)
LAST_CASE = 60  # seconds: what a case that begins in time may still take


@app.command(epilog="Example: fastxattn bench attention contrastive")
def bench(
    names: Annotated[
        list[str] | None, typer.Argument(help="attention, contrastive, ...; all but models when none is named")
    ] = None,
    full: Annotated[bool, typer.Option("--full", help="more shapes, slower rivals, whole models")] = False,
    minutes: Annotated[float | None, typer.Option(help="begin no case after this long; 10 without --full")] = None,
    as_json: Json = False,
) -> None:
    """Run the benchmarks of a source checkout: CSVs in benchmarks/results, tables here, charts in docs/images."""
    root = checkout()
    known = sorted(p.stem.removeprefix("bench_") for p in (root / "benchmarks").glob("bench_*.py"))
    for name in names or ():
        if name not in known:
            raise typer.BadParameter(f"must be one of {', '.join(known)}; got {name!r}")
    chosen = names or [name for name in known if full or name not in SLOW]
    end = time.time() + 60 * (minutes or (10 if not full else math.inf)) - LAST_CASE
    for place, name in enumerate(chosen):
        share = (end - time.time()) / (len(chosen) - place)
        until = {} if math.isinf(end) else {"FASTXATTN_BENCH_UNTIL": str(time.time() + max(share, 1.0))}
        more = FULL.get(name, ["--full"]) if full else []
        command = [sys.executable, "-m", f"benchmarks.bench_{name}", *more]
        done = subprocess.run(
            command, cwd=root, check=False, stdout=sys.stderr if as_json else None, env={**os.environ, **until}
        )
        if done.returncode != 0:
            raise RuntimeError(f"benchmark {name} ended with exit code {done.returncode}")
    if as_json:
        from fastxattn.bench import read_csv

        files = [root / f"benchmarks/results/{name}.csv" for name in chosen]
        emit({f.stem: read_csv(f) for f in files if f.exists()}, True)


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
