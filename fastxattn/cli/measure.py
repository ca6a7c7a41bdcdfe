"""``bench`` and ``report``: run the benchmarks of a source checkout and draw their results."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fastxattn.cli.common import Json, app, checkout, emit, from_checkout, working


@app.command(epilog="Example: fastxattn bench attention contrastive")
def bench(
    names: Annotated[list[str] | None, typer.Argument(help="attention, contrastive, ...; all if none is named")] = None,
    full: Annotated[bool, typer.Option("--full", help="more shapes, slower rivals, every whole model")] = False,
    minutes: Annotated[float | None, typer.Option(help="end after this long; 10 without --full")] = None,
    as_json: Json = False,
) -> None:
    """Run the benchmarks of a source checkout: CSVs in benchmarks/results, tables here, charts in docs/images.

    Operations share the time equally, and so do the cases of one operation. Cases without time are named at the end.
    """
    run_suite = from_checkout("benchmarks.harness.suite").run_suite
    done = run_suite(
        names or [], full=full, minutes=minutes, quiet=as_json, report=lambda line: typer.echo(line, err=True)
    )
    emit(done, as_json)


@app.command(epilog="Example: fastxattn report --out report.html")
def report(
    results: Annotated[
        Path | None, typer.Option(help="folder of CSVs; a checkout's benchmarks/results by default")
    ] = None,
    out: Annotated[Path, typer.Option(help="the page to write")] = Path("build/report.html"),
    as_json: Json = False,
) -> None:
    """Write one self-contained page of every result of a source checkout: speed, memory, accuracy, errors."""
    write_page = from_checkout("benchmarks.harness.page").write_page
    with working("drawing"):
        page = write_page(results or checkout() / "benchmarks/results", out)
    emit(page, as_json)
