"""Things to watch: ``demo``, ``search``, ``prune``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fastxattn.cli.common import Json, app, emit, working


@app.command(epilog="Example: fastxattn demo --layers 4 --out build/demo")
def demo(
    out: Annotated[Path, typer.Option(help="folder for the chart")] = Path("build/demo"),
    layers: Annotated[int, typer.Option(help="Q-Former layers (12 is the real size)")] = 12,
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
            "max error vs float64",
        ):
            table.add_column(column, justify="left" if column in ("dtype", "provider") else "right")
        for r in result.rows:
            peak = "unknown" if r.peak_mib is None else f"{r.peak_mib:.0f}"
            numbers = (f"{r.milliseconds:.0f}", f"{r.speedup:.2f}x", f"{r.gflops:.0f}", peak, f"{r.error:.2e}")
            table.add_row(r.dtype, r.provider, *numbers)
        console = Console()
        console.print(table)
        verdict = "agree with" if result.agrees else "DISAGREE with"
        console.print(f"The accelerated outputs {verdict} eager's, both measured against float64. Chart: {picture}")
    if not result.agrees:
        raise typer.Exit(1)


@app.command(epilog="Example: fastxattn search --out build/search")
def search(
    out: Annotated[Path, typer.Option(help="folder for similarity.png and search.json")] = Path("build/search"),
    steps: Annotated[int, typer.Option(help="training steps on scenes; half as many follow on photographs")] = 300,
    seed: int = 0,
    as_json: Json = False,
) -> None:
    """Train a small dual encoder with the fused InfoNCE loss, in seconds, and search with it in both directions."""
    from fastxattn import search as job

    with working(f"training for {steps} steps"):
        report = job.run(out, seed=seed, steps=steps)
    emit(report, as_json)


@app.command(epilog="Example: fastxattn prune photo.jpg --out kept.png --strategy all --keep 0.25")
def prune(
    photo: Annotated[Path, typer.Argument(help="any picture that Pillow reads")],
    out: Annotated[Path, typer.Option(help="picture to write")] = Path("build/pruned.png"),
    strategy: Annotated[str, typer.Option(help="a strategy's name, or all for one panel each")] = "divprune",
    keep: Annotated[float, typer.Option(help="share of the patches to keep")] = 0.25,
    as_json: Json = False,
) -> None:
    """Draw which patches of a photograph a pruning strategy keeps."""
    from fastxattn.ops.pruning.overlay import prune_photo

    out.parent.mkdir(parents=True, exist_ok=True)
    with working(f"pruning {photo}"):
        kept, patches = prune_photo(photo, out, strategy, keep)
    facts = {"picture": out, "strategy": strategy, "kept": kept, "patches": patches}
    emit(facts if as_json else f"{out}: {strategy} keeps {kept} of {patches} patches", as_json)
