"""Attention received by every key: ``python -m benchmarks.bench_importance [--match TEXT] [--full] [--rounds N]``.

The rivals work on a sequence at a time: the softmax map and its column sums, and, given the forward's log-sum-exp as
fastxattn is, ``exp(scores - lse)`` and its column sums. "attention" is fastxattn's forward on the same problem: the
cost of scores beside that of the attention they come from.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

import fastxattn
from benchmarks.bench_attention import IMAGE, TEXT, Inputs, Shape
from benchmarks.common import main, nbytes
from benchmarks.harness import Case, Workload
from fastxattn.testing import measure_error

SHAPES = [
    Shape("text to image, 16 ragged", TEXT, IMAGE),
    Shape("32 queries to 8 images of 577", (32,) * 8, (577,) * 8),
    Shape("one query to image, 16 ragged", (1,) * 16, IMAGE),
    Shape("dense 1x1024x1024 h16", (1024,), (1024,), heads=16),
]
MORE_SHAPES = [Shape("encoder, 4 x 577", (577,) * 4, (577,) * 4, heads=16)]


def workload(shape: Shape, dtype: torch.dtype) -> Workload:
    data = Inputs(shape, dtype, grad=False)
    query, key, value = data.packed
    longest = max(shape.lengths_q), max(shape.lengths_k)
    _, lse = fastxattn.varlen_cross_attention(
        *(t.double() for t in data.packed), *data.cu, *longest, return_lse=True, backend="reference"
    )
    given = lse.float()

    def ours() -> Tensor:
        return fastxattn.key_importance(query, key, given, *data.cu, *longest, backend="cpu")

    def maps(dtype: torch.dtype) -> Callable[[], Tensor]:
        pairs = [(q.to(dtype), k.to(dtype)) for q, k, _ in zip(*data.each, strict=True)]
        scale = shape.dim**-0.5
        return lambda: torch.cat([(q @ k.mT * scale).softmax(-1).sum(-2).mean(1)[0] for q, k in pairs])

    parts = [t[None, :, :, None] for t in given.split(shape.lengths_q, 1)]

    def with_lse() -> Tensor:
        scored = ((q @ k.mT * shape.dim**-0.5, z) for q, k, z in zip(*data.each[:2], parts, strict=True))
        return torch.cat([(s - z).exp().sum(-2).mean(1)[0] for s, z in scored])

    def check() -> str:
        report = measure_error("score", ours(), maps(torch.float64)(), maps(dtype)().float())
        return "ok" if report.ok else str(report)

    return Workload(
        {
            "fastxattn cpu": ours,
            "exp(scores - lse)": with_lse,
            "softmax map": maps(dtype),
            "attention": lambda: fastxattn.varlen_cross_attention(query, key, value, *data.cu, *longest, backend="cpu"),
        },
        rival="exp(scores - lse)",
        check=check,
        flops=2.0 * shape.heads * shape.dim * shape.pairs,
        bytes=nbytes(query, key, given) + 4.0 * key.shape[0],
    )


def cases(full: bool = False) -> Iterator[Case]:
    for shape in SHAPES + (MORE_SHAPES if full else []):
        for dtype in (torch.float32, torch.bfloat16):
            build = lambda shape=shape, dtype=dtype: workload(shape, dtype)  # noqa: E731
            yield Case("importance", shape.name, "forward", dtype, build)


if __name__ == "__main__":
    main("importance", cases)
