"""Late interaction: ``python -m benchmarks.bench_late_interaction [--full] [--memory]``.

The rival is FILIP's loss as it is usually written: one einsum to all token similarities, two maxima, two cross
entropies. ``--memory`` prints the peak extra memory of one step of both instead. Scores alone are timed on re-ranking,
against a product and a maximum per document, and against one padded einsum with a mask.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

import fastxattn
from benchmarks.common import main, nbytes
from benchmarks.harness.registry import Case, Workload
from fastxattn.runtime.timing import peak_extra_bytes
from fastxattn.testing import measure_error, offsets

Step = Callable[[], tuple[Tensor, ...]]


def steps(sets: int, tokens_a: int, tokens_b: int, d: int) -> tuple[Step, Step]:
    """Forward and backward, fastxattn and eager, on the same tokens."""
    a, b = (F.normalize(torch.randn(sets * t, d), dim=1).requires_grad_() for t in (tokens_a, tokens_b))
    cu_a, cu_b = (torch.arange(sets + 1, dtype=torch.int32) * t for t in (tokens_a, tokens_b))

    def ours() -> tuple[Tensor, ...]:
        return torch.autograd.grad(fastxattn.late_interaction_loss(a, b, cu_a, cu_b, 10.0, backend="cpu"), (a, b))

    def eager() -> tuple[Tensor, ...]:
        similarity = torch.einsum("nid,mjd->nmij", a.view(sets, tokens_a, d), b.view(sets, tokens_b, d))
        labels = torch.arange(sets)
        rows, columns = similarity.max(3).values.mean(2), similarity.max(2).values.mean(2)
        loss = (F.cross_entropy(10 * rows, labels) + F.cross_entropy(10 * columns.T, labels)) / 2
        return torch.autograd.grad(loss, (a, b))

    return ours, eager


def case(sets: int, tokens_a: int, tokens_b: int, d: int) -> Case:
    def build() -> Workload:
        ours, eager = steps(sets, tokens_a, tokens_b, d)

        def check() -> str:
            pairs = zip(ours(), eager(), strict=True)
            errors = [((x - y).norm() / y.norm()).item() for x, y in pairs]
            # A tie within rounding sends a gradient elsewhere, in either implementation.
            return "ok" if max(errors) < 1e-3 else f"gradients differ by {max(errors):.1e}"

        # Every pair of sets keeps the place of each token's best match, for the gradient.
        tokens = sets * (tokens_a + tokens_b)
        flops, moved = 2.0 * sets * sets * tokens_a * tokens_b * d, 4.0 * tokens * (3 * d + 2 * sets)
        return Workload({"fastxattn cpu": ours, "einsum + max": eager}, "einsum + max", check, flops, moved)

    name = f"{sets} x {sets} sets of {tokens_a} x {tokens_b}, D={d}"
    return Case("late_interaction", name, "forward+backward", torch.float32, build)


def scores(queries: int, documents: int, tokens_q: int, longest: int, d: int) -> Case:
    """ColBERT's re-ranking: every query against documents of different lengths, without gradients."""

    def build() -> Workload:
        g = torch.Generator().manual_seed(0)
        lengths = torch.randint(longest // 4, longest + 1, (documents,), generator=g)
        a = F.normalize(torch.randn(queries * tokens_q, d, generator=g), dim=1)
        b = F.normalize(torch.randn(int(lengths.sum()), d, generator=g), dim=1)
        cu_a = torch.arange(0, queries * tokens_q + 1, tokens_q, dtype=torch.int32)
        cu_b = offsets(lengths.tolist())
        padded = torch.nn.utils.rnn.pad_sequence(b.split(lengths.tolist()), batch_first=True)
        hidden = torch.arange(padded.shape[1]) >= lengths[:, None]

        def ours() -> Tensor:
            return fastxattn.maxsim(a, b, cu_a, cu_b, backend="cpu")

        def loop() -> Tensor:
            rows = (a @ part.T for part in b.split(lengths.tolist()))
            return torch.stack([s.max(1).values.view(queries, tokens_q).sum(1) for s in rows], 1)

        def masked() -> Tensor:
            similarity = torch.einsum("td,msd->tms", a, padded).masked_fill(hidden, -torch.inf)
            return similarity.max(2).values.view(queries, tokens_q, documents).sum(1)

        def check() -> str:
            wide = a.double(), b.double(), cu_a, cu_b
            report = measure_error("scores", ours(), fastxattn.maxsim(*wide, backend="reference"), loop())
            return "ok" if report.ok else str(report)

        providers: dict[str, Callable[[], object]] = {
            "fastxattn cpu": ours,
            "loop over documents": loop,
            "einsum + mask + max": masked,
        }
        flops, moved = 2.0 * a.shape[0] * b.shape[0] * d, nbytes(a, b) + 4.0 * queries * documents
        return Workload(providers, "loop over documents", check, flops, moved)

    name = f"{queries} queries of {tokens_q} x {documents} documents of {longest // 4}..{longest}, D={d}"
    return Case("maxsim", name, "forward", torch.float32, build)


def cases(full: bool) -> Iterator[Case]:
    """FILIP's shape, 32 words against 196 patches, and ColBERT's."""
    yield case(64, 32, 196, 256)
    yield scores(16, 500, 32, 180, 128)
    if full:
        yield case(256, 32, 196, 256)


if __name__ == "__main__":
    if "--memory" in sys.argv:
        fused, eager = (peak_extra_bytes(step) for step in steps(256 if "--full" in sys.argv else 64, 32, 196, 256))
        if fused is not None and eager is not None:
            print(f"fastxattn cpu {fused / 2**20:.0f} MiB, eager {eager / 2**20:.0f} MiB: {fused / eager:.1%}")
    else:
        main("late_interaction", cases)
