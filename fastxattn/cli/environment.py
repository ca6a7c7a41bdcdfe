"""What is here, and what it would do: ``env``, ``explain``, ``tune``."""

from __future__ import annotations

import json
import platform
from typing import Annotated

import typer

from fastxattn.cli.common import Json, app, emit, working


@app.command(epilog="Example: fastxattn env --json")
def env(as_json: Json = False) -> None:
    """Versions, processor, and which backends work here. Paste this into a bug report."""
    import torch

    import fastxattn
    from fastxattn.runtime import env as settings
    from fastxattn.runtime import native
    from fastxattn.runtime.timing import device_name

    cpu = native.cpu_library()
    cuda = native.cuda_library().reason or f"kernels loaded, for {', '.join(native.cuda_archs())}"
    facts = {
        "fastxattn": fastxattn.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": torch.__version__,
        "device": device_name(),
        "threads": torch.get_num_threads(),
        "cpu kernels": cpu.reason or f"loaded, running on {native.active_cpu_isa()}",
        "cpu instruction sets": ", ".join(native.available_cpu_isas()),
        "cuda": cuda if torch.cuda.is_available() else f"no CUDA device; {cuda}",
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


@app.command(epilog="Example: fastxattn explain attention --lengths-q 8*32 --lengths-k 257,64,1024,5*577 -t bfloat16")
def explain(
    op: Annotated[str, typer.Argument(help="attention, importance, infonce, ...; a wrong name lists them all")],
    lengths_q: Annotated[str, typer.Option(help="query lengths: 32,77 or 8*32 (eight of 32), or both")] = "8*32",
    lengths_k: Annotated[str, typer.Option(help="key lengths, written the same way")] = "8*257",
    heads: Annotated[int, typer.Option(help="query heads")] = 12,
    kv_heads: Annotated[int | None, typer.Option(help="key and value heads; as many as heads by default")] = None,
    dim: Annotated[int, typer.Option(help="head dim, or the width of features")] = 64,
    dtype: Annotated[str, typer.Option("--dtype", "-t", help="float32, bfloat16, float16, float64")] = "float32",
    device: Annotated[str, typer.Option(help="where the tensors would be: cpu, cuda")] = "cpu",
    backend: Annotated[str, typer.Option(help="ask for one; the reason is given where it cannot")] = "auto",
    causal: Annotated[bool, typer.Option(help="attention over a causal kv_range")] = False,
    as_json: Json = False,
) -> None:
    """Which backend would run an operation on such shapes, and why the others would not. Nothing is computed."""
    from fastxattn.cli.problems import Shape, lengths, problem
    from fastxattn.runtime.backend import explain_call

    shape = Shape(
        lengths("--lengths-q", lengths_q),
        lengths("--lengths-k", lengths_k),
        heads,
        kv_heads or heads,
        dim,
        dtype,
        device,
        causal,
    )
    call, arguments, options = problem(op, shape)
    explanation = explain_call(call, *arguments, **options, backend=backend)
    emit(explanation, as_json)
    if explanation.chosen == "none":
        raise typer.Exit(1)


@app.command(epilog="Example: fastxattn tune --kernel attention.forward --dim 64")
def tune(
    kernel: Annotated[list[str] | None, typer.Option(help="op.kernel; repeat for several; all by default")] = None,
    dim: Annotated[list[int] | None, typer.Option(help="widest head dim: 64, 128, 256; all by default")] = None,
    as_json: Json = False,
) -> None:
    """Measure the Triton kernels' tiles on this machine's GPU and keep the fastest for later processes."""
    from fastxattn import tune as job

    lines: list[str] = []

    def report(line: str) -> None:
        lines.append(line)
        typer.echo(line, err=as_json)

    with working("tuning"):
        path = job.run(tuple(kernel or ()), tuple(dim or ()), report)
    emit({"cache": path, "tuned": lines} if as_json else f"written to {path}", as_json)
