"""``demo`` and ``prune``: the package at work on photographs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fastxattn.cli.common import Json, app, emit, working


@app.command(epilog="Example: fastxattn demo --layers 4 --out build/demo")
def demo(
    out: Annotated[Path, typer.Option(help="folder for the chart")] = Path("build/demo"),
    layers: Annotated[int, typer.Option(min=1, help="Q-Former layers (12 is the real size)")] = 12,
    as_json: Json = False,
) -> None:
    """Run BLIP-2's Q-Former on real photographs, eager against fastxattn, and compare numbers and speed."""
    from rich.console import Console
    from rich.table import Table

    from fastxattn import demo as job

    with working("starting") as say:
        result = job.run(layers, progress=say)
    picture = out / "qformer.png"
    job.draw(result, picture)
    if as_json:
        emit(result, True)
    else:
        counts = f"{len(result.patches)} photographs, {min(result.patches)} to {max(result.patches)} patches"
        words = f"captions of {min(result.words)} to {max(result.words)} words"
        table = Table(title=f"BLIP-2 Q-Former: {counts}, {words}; {result.threads} threads\n{result.device}")
        for column in (
            "dtype",
            "provider",
            "ms / batch",
            "speed-up",
            "useful GFLOP/s",
            "peak MiB",
            "max error",
        ):
            named = column in ("dtype", "provider")
            table.add_column(column, justify="left" if named else "right", no_wrap=named)
        for r in result.rows:
            peak = "unknown" if r.peak_mib is None else f"{r.peak_mib:.0f}"
            numbers = (f"{r.milliseconds:.0f}", f"{r.speedup:.2f}x", f"{r.gflops:.0f}", peak, f"{r.error:.1e}")
            table.add_row(r.dtype, r.provider, *numbers)
        console = Console()
        console.print(table)
        for dtype in dict.fromkeys(r.dtype for r in result.rows if r.runs == 1):
            slow = max(r.milliseconds for r in result.rows if r.dtype == dtype) / 1e3
            console.print(f"{dtype}: a single run each, because a batch takes up to {slow:.0f} s here.")
        verdict = "agree with" if result.agrees else "DISAGREE with"
        console.print(f"The accelerated outputs {verdict} eager's, both measured against float64. Chart: {picture}")
    if not result.agrees:
        raise typer.Exit(1)


@app.command(epilog="Example: fastxattn prune photo.jpg --out kept.png --strategy divprune --strategy tome --keep 0.25")
def prune(
    photo: Annotated[Path, typer.Argument(help="any picture that Pillow reads")],
    out: Annotated[Path, typer.Option(help="the picture to write (png, jpg, webp, pdf)")],
    strategy: Annotated[list[str] | None, typer.Option(help="repeat for several; all when none is named")] = None,
    keep: Annotated[float, typer.Option(help="share of the patches to keep")] = 0.25,
    as_json: Json = False,
) -> None:
    """Draw which patches of a photograph each pruning strategy keeps.

    Patches are described by their frequencies and colours; examples/prune_photo.py does the same inside a model.
    """
    from fastxattn.cli.photo import prune_photo

    with working(f"pruning {photo}"):
        titles = prune_photo(photo, out, strategy or [], keep)
    text = "\n".join([*titles, "scores: patch frequencies, no trained model", f"written: {out}"])
    emit({"picture": out, "panels": titles} if as_json else text, as_json)
