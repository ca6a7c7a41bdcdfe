"""Contrastive losses, late interaction and retrieval: ``python -m benchmarks.bench_contrastive [--memory] [--full]``.

The rivals are the formulas as they are usually written in plain PyTorch: CLIP's loss as open_clip computes it on one
process (two products and two cross entropies), SigLIP's with its matrix of signs, einsum and max for late
interaction, matmul and topk for retrieval. With ``--memory`` peak memory against N is measured instead of time.
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.common import IMAGES, RESULTS, main
from fastxattn.bench.memory import peak_extra_bytes
from fastxattn.bench.records import device_name, git_sha, versions
from fastxattn.bench.registry import Case, Workload
from fastxattn.ops.contrastive import infonce_loss, sigmoid_loss
from fastxattn.ops.late_interaction import late_interaction_loss
from fastxattn.ops.retrieval import topk_similarity

Loss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def eager_clip(a: Tensor, b: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    labels = torch.arange(a.shape[0])
    return (F.cross_entropy(scale * a @ b.T, labels) + F.cross_entropy(scale * b @ a.T, labels)) / 2


def eager_clip_one_product(a: Tensor, b: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    labels, logits = torch.arange(a.shape[0]), scale * a @ b.T
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


def eager_siglip(a: Tensor, b: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    logits = scale * a @ b.T + bias
    signs = 2 * torch.eye(a.shape[0], dtype=logits.dtype) - torch.ones(a.shape[0], dtype=logits.dtype)
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
        return Workload(providers, next(iter(rivals)), check, 6.0 * n * n * d)

    return Case(op, f"N={n} D={d}", "forward+backward", dtype, build)


def maxsim_case(sets: int, tokens_a: int, tokens_b: int, d: int) -> Case:
    def build() -> Workload:
        a, b = (F.normalize(torch.randn(sets * t, d), dim=1).requires_grad_() for t in (tokens_a, tokens_b))
        cu_a, cu_b = (torch.arange(sets + 1, dtype=torch.int32) * t for t in (tokens_a, tokens_b))

        def eager(both: bool = True) -> tuple[Tensor, ...]:
            similarity = torch.einsum("nid,mjd->nmij", a.view(sets, tokens_a, d), b.view(sets, tokens_b, d))
            labels = torch.arange(sets)
            rows, columns = similarity.max(3).values.mean(2), similarity.max(2).values.mean(2)
            loss = (F.cross_entropy(10 * rows, labels) + F.cross_entropy(10 * columns.T, labels)) / 2
            return torch.autograd.grad(loss, (a, b))

        def ours() -> tuple[Tensor, ...]:
            return torch.autograd.grad(late_interaction_loss(a, b, cu_a, cu_b, 10.0, backend="cpu"), (a, b))

        def check() -> str:
            errors = [relative(x, y) for x, y in zip(ours(), eager(), strict=True)]
            return "ok" if max(errors) < 1e-3 else f"gradients differ by {max(errors):.1e}"

        return Workload(
            {"fastxattn cpu": ours, "einsum + max": eager}, "einsum + max", check,
            2.0 * sets * sets * tokens_a * tokens_b * d,
        )  # fmt: skip

    return Case("late_interaction", f"{sets} x {sets} sets of {tokens_a} x {tokens_b}, D={d}", "forward+backward",
                torch.float32, build)  # fmt: skip


def topk_case(rows: int, d: int, queries: int, k: int) -> Case:
    def build() -> Workload:
        corpus, query = torch.randn(rows, d), torch.randn(queries, d)

        def check() -> str:
            ours, theirs = topk_similarity(query, corpus, k, backend="cpu"), (query @ corpus.T).topk(k)
            agree = (ours[1] == theirs.indices).float().mean().item()
            return "ok" if agree > 0.999 else f"only {agree:.4f} of the rows agree"

        providers: dict[str, Callable[[], object]] = {
            "fastxattn cpu": lambda: topk_similarity(query, corpus, k, backend="cpu"),
            "matmul + topk": lambda: (query @ corpus.T).topk(k),
        }
        try:
            import faiss

            index = faiss.IndexFlatIP(d)
            index.add(corpus.numpy())
            faiss.omp_set_num_threads(torch.get_num_threads())
            providers["faiss flat"] = lambda: index.search(query.numpy(), k)
        except ImportError:
            pass
        return Workload(providers, "matmul + topk", check, 2.0 * rows * d * queries)

    return Case("retrieval", f"top-{k} of {rows} x {d}, {queries} queries", "forward", torch.float32, build)


def cases(full: bool) -> Iterator[Case]:
    for op in LOSSES:
        for dtype in (torch.float32, torch.bfloat16):
            for n in (256, 1024, 2048, 8192) if full else (256, 2048, 8192):
                yield loss_case(op, n, 512, dtype)
    yield maxsim_case(256, 32, 196, 256) if full else maxsim_case(64, 32, 196, 256)
    yield topk_case(1_000_000 if full else 200_000, 256, 64, 10)


def memory(sizes: tuple[int, ...], path: Path) -> None:
    """Peak extra memory of one step against N; the rival is measured where its matrices fit, at half the sizes."""
    rows = []
    for op, (fused, rivals) in LOSSES.items():
        for n in sizes:
            a, b = features(n, 512, torch.float32)
            logits = 4 * n * n
            for name, f in (("fastxattn cpu", fused), next(iter(rivals.items()))):
                if f is not fused and n > 8192:
                    continue
                peak = peak_extra_bytes(step(f, a, b))
                if peak is not None:
                    rows.append([op, n, name, peak, f"{peak / logits:.4f}", device_name(), versions(), git_sha()])
                    print(*rows[-1][:5], flush=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["op", "n", "provider", "peak_bytes", "share_of_logits", "device", "versions", "git_sha"])
        writer.writerows(rows)
    plot_memory(rows)


def plot_memory(rows: list[list[object]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4))
    for op, provider in dict.fromkeys((r[0], r[2]) for r in rows):
        points = [(int(str(r[1])), int(str(r[3])) / 2**20) for r in rows if (r[0], r[2]) == (op, provider)]
        axes.plot(*zip(*points, strict=True), marker="o", label=f"{op}: {provider}")
    axes.set(xscale="log", yscale="log", xlabel="N (D = 512, float32)", ylabel="peak extra memory, MiB")
    axes.legend()
    IMAGES.mkdir(parents=True, exist_ok=True)
    figure.savefig(IMAGES / "contrastive_memory.png", dpi=120, bbox_inches="tight")


if __name__ == "__main__":
    if "--memory" in sys.argv:
        memory(
            (1024, 2048, 4096, 8192, 32768) if "--full" in sys.argv else (1024, 4096),
            RESULTS / "contrastive_memory.csv",
        )
    else:
        main("contrastive", cases)
