"""Contrastive losses: ``python -m benchmarks.bench_contrastive [--memory N ...] [--full]``.

The rivals are the formulas as they are usually written in plain PyTorch: CLIP's loss as open_clip computes it on one
process (two products and two cross entropies), SigLIP's with its matrix of signs. With ``--memory`` peak memory at
these N is measured instead of time. Both draw a chart against N from everything in their CSV.
"""

from __future__ import annotations

import csv
import math
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.common import IMAGES, RESULTS, main, nbytes
from benchmarks.harness import read_csv
from benchmarks.harness.records import git_sha, versions
from benchmarks.harness.registry import Case, Workload
from fastxattn.ops.contrastive import infonce_loss, sigmoid_loss
from fastxattn.runtime.timing import device_name, peak_extra_bytes

Loss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def eager_clip(a: Tensor, b: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    labels = torch.arange(a.shape[0], device=a.device)
    return (F.cross_entropy(scale * a @ b.T, labels) + F.cross_entropy(scale * b @ a.T, labels)) / 2


def eager_clip_one_product(a: Tensor, b: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    labels, logits = torch.arange(a.shape[0]), scale * a @ b.T
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


def eager_siglip(a: Tensor, b: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    logits = scale * a @ b.T + bias
    signs = 2 * torch.eye(a.shape[0], dtype=logits.dtype, device=a.device) - 1
    return -F.logsigmoid(signs * logits).sum() / a.shape[0]


def fused_clip(a: Tensor, b: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    return infonce_loss(a, b, scale, backend="cpu")


def fused_siglip(a: Tensor, b: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    return sigmoid_loss(a, b, scale, bias, backend="cpu")


LOSSES: dict[str, tuple[Loss, dict[str, Loss]]] = {
    "infonce": (fused_clip, {"open_clip's formula": eager_clip, "eager, one product": eager_clip_one_product}),
    "sigmoid": (fused_siglip, {"open_clip's formula": eager_siglip}),
}


def features(n: int, d: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    a, b = (F.normalize(torch.randn(n, d, generator=generator), dim=1) for _ in range(2))
    b = F.normalize(a + 2 * b, dim=1)  # pairs at cosine 0.45, as after some training
    return a.to(dtype), b.to(dtype)


def step(loss: Loss, a: Tensor, b: Tensor) -> Callable[[], tuple[Tensor, ...]]:
    x, y = a.clone().requires_grad_(), b.clone().requires_grad_()
    scale, bias = torch.tensor(14.3, requires_grad=True), torch.tensor(-10.0)

    def run() -> tuple[Tensor, ...]:
        return torch.autograd.grad(loss(x, y, scale.to(x.dtype) if loss in RIVALS else scale, bias), (x, y, scale))

    return run


RIVALS = [rival for _, rivals in LOSSES.values() for rival in rivals.values()]


def relative(x: Tensor, y: Tensor) -> float:
    return ((x.double() - y.double()).norm() / y.double().norm()).item()


def loss_case(op: str, n: int, d: int, dtype: torch.dtype) -> Case:
    def build() -> Workload:
        fused, rivals = LOSSES[op]
        a, b = features(n, d, dtype)
        small_a, small_b = a[:1024], b[:1024]

        def check() -> str:
            exact = step(next(iter(rivals.values())), small_a.double(), small_b.double())()
            for name, got, want in zip(("a", "b"), step(fused, small_a, small_b)(), exact, strict=False):
                floor = relative(want.to(dtype), want)
                error = (max(0.0, relative(got, want) ** 2 - floor**2)) ** 0.5
                if error > (1e-5 if dtype == torch.float32 else 1e-3):
                    return f"gradient of {name} off by {error:.1e}"
            return "ok"

        providers = {"fastxattn cpu": step(fused, a, b), **{name: step(f, a, b) for name, f in rivals.items()}}
        return Workload(providers, next(iter(rivals)), check, 6.0 * n * n * d, 3 * nbytes(a, b))

    return Case(op, f"N={n} D={d}", "forward+backward", dtype, build)


def cases(full: bool) -> Iterator[Case]:
    for n in (256, 1024, 2048, 8192) if full else (256, 2048, 8192):  # the longest come last
        for op in LOSSES:
            for dtype in (torch.float32, torch.bfloat16):
                yield loss_case(op, n, 512, dtype)


def memory(sizes: list[int], path: Path) -> None:
    """Peak extra memory of one step against N; the rival is measured where its matrices fit."""
    rows = []
    for op, (fused, rivals) in LOSSES.items():
        for n in sizes:
            a, b = features(n, 512, torch.float32)
            for name, f in (("fastxattn cpu", fused), next(iter(rivals.items()))):
                peak = peak_extra_bytes(step(f, a, b)) if f is fused or n <= 8192 else None
                if peak is not None:
                    share = f"{peak / (4 * n * n):.4f}"
                    rows.append([op, str(n), name, str(peak), share, device_name(), versions(), git_sha()])
                    print(*rows[-1][:5], flush=True)
    done = {(row[0], row[1], row[2]) for row in rows}
    if path.exists():
        with path.open(newline="") as file:
            rows = [row for row in list(csv.reader(file))[1:] if (row[0], row[1], row[2]) not in done] + rows
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["op", "n", "provider", "peak_bytes", "share_of_logits", "device", "versions", "git_sha"])
        writer.writerows(rows)
    lines: Lines = {}
    for row in rows:
        lines.setdefault(f"{row[0]}: {row[2]}", []).append((int(row[1]), int(row[3]) / 2**20))
    plot(lines, "peak extra memory, MiB", IMAGES / "contrastive_memory.png")


Lines = dict[str, list[tuple[int, float]]]


def times(path: Path) -> None:
    """Draw the float32 step's time against N from the CSV, per device."""
    lines: Lines = {}
    for r in read_csv(path) if path.exists() else []:
        size = re.fullmatch(r"N=(\d+) D=512", r.case)
        if size and r.dtype == "float32" and math.isfinite(r.median_ms):
            lines.setdefault(f"{r.op}: {r.provider} ({r.device})", []).append((int(size[1]), r.median_ms))
    plot(lines, "forward and backward, ms", IMAGES / "contrastive_time.png")


def plot(lines: Lines, label: str, path: Path) -> None:
    """Lines over N, both axes logarithmic."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5))
    for name, points in lines.items():
        axes.plot(*zip(*sorted(points), strict=True), marker="o", label=name)
    axes.set(xscale="log", yscale="log", xlabel="N (D = 512, float32)", ylabel=label)
    sizes = sorted({n for points in lines.values() for n, _ in points})
    axes.set_xticks(sizes, map(str, sizes))
    axes.minorticks_off()
    axes.legend(fontsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120, bbox_inches="tight")
    plt.close(figure)


if __name__ == "__main__":
    if "--memory" in sys.argv:
        sizes = [int(x) for x in sys.argv[sys.argv.index("--memory") + 1 :]]
        memory(sizes or [1024, 4096], RESULTS / "contrastive_memory.csv")
    else:
        main("contrastive", cases)
        times(RESULTS / "contrastive.csv")
