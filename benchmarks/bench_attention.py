"""Cross-attention on the CPU against the ways people run it today.

    python -m benchmarks.bench_attention [--match TEXT] [--full] [--rounds N]

Every provider runs in this process on the same numbers, interleaved. Rivals get the layout they like best: padded SDPA
gets contiguous (batch, heads, length, dim); the per-sequence loop gets one leaf tensor per sequence, so that its
backward scatters nothing. The headline rival is SDPA for dense cases and the per-sequence loop for ragged ones. The
padded cases give everyone but the loop the same padded batch, as ``cross_attention`` takes it; their rival is SDPA with
the mask.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import fastxattn
from benchmarks.common import main, nbytes
from benchmarks.harness import Case, Workload
from fastxattn.testing import measure_error, offsets


@dataclass(frozen=True)
class Shape:
    """Lengths of every sequence; ``dense`` when all are equal."""

    name: str
    lengths_q: tuple[int, ...]
    lengths_k: tuple[int, ...]
    heads: int = 12
    dim: int = 64

    @property
    def dense(self) -> bool:
        return len(set(self.lengths_q)) == len(set(self.lengths_k)) == 1

    @property
    def pairs(self) -> int:
        return sum(q * k for q, k in zip(self.lengths_q, self.lengths_k, strict=True))


def ragged(low: int, high: int, count: int, seed: int) -> tuple[int, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(low, high + 1, (count,), generator=generator).tolist())


TEXT, IMAGE = ragged(5, 77, 16, 0), ragged(64, 1024, 16, 1)
SHAPES = [
    Shape("dense 8x32x257", (32,) * 8, (257,) * 8),
    Shape("dense 8x77x577", (77,) * 8, (577,) * 8),
    Shape("dense 4x577x77", (577,) * 4, (77,) * 4),
    Shape("dense 1x1024x1024 h16", (1024,), (1024,), heads=16),
    Shape("text to image, 16 ragged", TEXT, IMAGE),
    Shape("image to text, 16 ragged", IMAGE, TEXT),
    Shape("one query to image, 16 ragged", (1,) * 16, IMAGE),
]
MORE_SHAPES = [
    Shape("Q-Former 8x32x577", (32,) * 8, (577,) * 8),
    Shape("Q-Former 8x32x1024", (32,) * 8, (1024,) * 8),
    Shape("Perceiver 4x64x4096", (64,) * 4, (4096,) * 4),
    Shape("text to image, 16 ragged, D 80", TEXT, IMAGE, dim=80),
    Shape("text to image, 16 ragged, D 128", TEXT, IMAGE, heads=8, dim=128),
    Shape("dense 1x1024x1024 h16 D 128", (1024,), (1024,), heads=16, dim=128),
]


def eager(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) v written out, on (heads, length, dim)."""
    scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
    return scores.softmax(-1) @ value


class Inputs:
    """The same numbers in every provider's layout."""

    def __init__(self, shape: Shape, dtype: torch.dtype, grad: bool, padded: bool = False) -> None:
        generator = torch.Generator().manual_seed(0)
        self.shape, self.grad, self.padded_call = shape, grad, padded

        def make(lengths: tuple[int, ...]) -> Tensor:
            return torch.randn(sum(lengths), shape.heads, shape.dim, generator=generator).to(dtype)

        self.packed = [make(shape.lengths_q), make(shape.lengths_k), make(shape.lengths_k)]
        lengths = [shape.lengths_q, shape.lengths_k, shape.lengths_k]
        self.cu = [offsets(n) for n in lengths[:2]]
        self.each = [list(t.split(n)) for t, n in zip(self.packed, lengths, strict=True)]
        self.each = [[x.transpose(0, 1).unsqueeze(0).clone() for x in xs] for xs in self.each]
        self.padded = [
            torch.nn.utils.rnn.pad_sequence([x[0].transpose(0, 1) for x in xs], batch_first=True)
            .transpose(1, 2)
            .contiguous()
            for xs in self.each
        ]
        self.present = [
            torch.arange(t.shape[2]) < torch.tensor(n)[:, None] for t, n in zip(self.padded, lengths, strict=True)
        ]
        self.mask = None if shape.dense else self.present[1][:, None, None, :]
        self.rows = [t.transpose(1, 2).contiguous() for t in self.padded] if padded else []
        if grad:
            for t in [*self.packed, *self.padded, *self.rows, *(x for xs in self.each for x in xs)]:
                t.requires_grad_()
        self.grad_packed = torch.randn(self.packed[0].shape, generator=generator).to(dtype)
        self.grad_each = [x.transpose(0, 1).unsqueeze(0) for x in self.grad_packed.split(shape.lengths_q)]
        self.grad_padded = torch.ones_like(self.padded[0])
        self.grad_rows = torch.zeros_like(self.rows[0]) if padded else self.grad_packed
        if padded:
            self.grad_rows[self.present[0]] = self.grad_packed

    @property
    def moved(self) -> float:
        """Bytes of query, key, value and output; backward reads them with the output's gradient and writes theirs."""
        return nbytes(*self.packed, self.packed[0]) * (3 if self.grad else 1)

    def ours(self) -> Tensor:
        if self.padded_call:
            query_mask, key_mask, _ = self.present
            return fastxattn.cross_attention(*self.rows, query_mask=query_mask, key_mask=key_mask, backend="cpu")
        return fastxattn.varlen_cross_attention(
            *self.packed, *self.cu, max(self.shape.lengths_q), max(self.shape.lengths_k), backend="cpu"
        )

    def loop(self, attention: Callable[..., Tensor] = F.scaled_dot_product_attention) -> list[Tensor]:
        return [attention(q, k, v) for q, k, v in zip(*self.each, strict=True)]

    def sdpa(self) -> Tensor:
        return F.scaled_dot_product_attention(*self.padded, attn_mask=self.mask)

    def eager_loop(self) -> list[Tensor]:
        return self.loop(eager)

    def with_grad(self, forward: Callable[[], object]) -> Callable[[], object]:
        """``forward`` alone, or followed by the gradients of query, key and value."""
        if not self.grad:

            def run() -> object:
                with torch.no_grad():
                    return forward()

            return run
        leaves: dict[int, tuple[list[Tensor], object]] = {
            id(Inputs.ours): (self.rows, self.grad_rows) if self.padded_call else (self.packed, self.grad_packed),
            id(Inputs.sdpa): (self.padded, self.grad_padded),
        }
        inputs, grads = leaves.get(id(forward.__func__), ([x for xs in self.each for x in xs], self.grad_each))  # type: ignore[attr-defined]
        return lambda: torch.autograd.grad(forward(), inputs, grads)  # type: ignore[arg-type]

    def check(self) -> str:
        """Check the output (and gradients) against float64; the written-out loop sets the error budget."""
        ours = self.with_grad(self.ours)()
        yard = self.with_grad(self.eager_loop)()
        exact = Inputs.__new__(Inputs)
        exact.__dict__.update(self.__dict__)
        exact.each = [[x.detach().double().requires_grad_(self.grad) for x in xs] for xs in self.each]
        exact.grad_each = [g.double() for g in self.grad_each]
        reference = exact.with_grad(exact.eager_loop)()

        def pack(parts: object) -> list[Tensor]:
            n, flat = len(self.shape.lengths_q), list(parts)  # type: ignore[call-overload]
            return [torch.cat([x[0].transpose(0, 1) for x in flat[i : i + n]]) for i in range(0, len(flat), n)]

        results = list(ours) if self.grad else [ours]  # type: ignore[call-overload]
        if self.padded_call:
            results = [t[present] for t, present in zip(results, self.present, strict=False)]
        for name, a, r, e in zip(("query", "key", "value"), results, pack(reference), pack(yard), strict=False):
            report = measure_error(f"grad {name}" if self.grad else "out", a, r, e, backward=self.grad)  # type: ignore[arg-type]
            if not report.ok:
                return str(report)
        return "ok"


def workload(shape: Shape, dtype: torch.dtype, grad: bool, full: bool = False, padded: bool = False) -> Workload:
    data = Inputs(shape, dtype, grad, padded)
    providers = {
        "fastxattn cpu": data.with_grad(data.ours),
        "sdpa loop": data.with_grad(data.loop),
        "sdpa padded": data.with_grad(data.sdpa),
        "eager loop": data.with_grad(data.eager_loop),
    }
    nested = nested_sdpa(data) if full else None
    if nested is not None:
        providers["nested sdpa"] = nested
    products = 4 * shape.heads * shape.dim * shape.pairs
    return Workload(
        providers,
        rival="sdpa padded" if shape.dense or padded else "sdpa loop",
        check=data.check,
        flops=products * (3.5 if grad else 1),
        bytes=data.moved,
    )


def nested_sdpa(data: Inputs) -> Callable[[], object] | None:
    """torch.nested (jagged) SDPA, forward only; None where this torch does not run it on the CPU."""
    if data.grad:
        return None
    parts = [
        torch.nested.nested_tensor_from_jagged(t, cu.long()).transpose(1, 2)
        for t, cu in zip(data.packed, (data.cu[0], data.cu[1], data.cu[1]), strict=True)
    ]

    def run() -> object:
        with torch.no_grad():
            return F.scaled_dot_product_attention(*parts)

    try:
        run()
    except (RuntimeError, NotImplementedError, ValueError):
        return None
    return run


def flex_workload(dtype: torch.dtype) -> Workload:
    """Compiled FlexAttention with a document mask over the packed tokens, forward, on the ragged text-to-image case."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    data = Inputs(SHAPES[4], dtype, grad=False)
    owner = [torch.repeat_interleave(torch.arange(16), cu.diff()) for cu in data.cu]
    query, key, value = (t.transpose(0, 1).unsqueeze(0).contiguous() for t in data.packed)
    mask = create_block_mask(
        lambda b, h, i, j: owner[0][i] == owner[1][j], None, None, len(owner[0]), len(owner[1]), device="cpu"
    )
    compiled = torch.compile(flex_attention)

    def flex() -> Tensor:
        with torch.no_grad():
            return compiled(query, key, value, block_mask=mask)

    return Workload(
        {"fastxattn cpu": data.with_grad(data.ours), "flex_attention compiled": flex},
        rival="flex_attention compiled",
        check=data.check,
        flops=4 * 12 * 64 * SHAPES[4].pairs,
        bytes=data.moved,
    )


def overhead_workload() -> Workload:
    """One sequence of one query and one key: what a call costs before any work."""
    data = Inputs(Shape("1x1", (1,), (1,), heads=1), torch.float32, grad=False)
    providers = {"fastxattn cpu": data.with_grad(data.ours), "sdpa": data.with_grad(data.sdpa)}
    return Workload(providers, rival="sdpa", check=data.check)


def cases(full: bool = False) -> Iterator[Case]:
    for shape in SHAPES + (MORE_SHAPES if full else []):
        for grad in (False, True):
            if grad and not full and "ragged" not in shape.name:
                continue
            for dtype in (torch.float32, torch.bfloat16):
                direction = "forward+backward" if grad else "forward"
                build = lambda shape=shape, dtype=dtype, grad=grad: workload(shape, dtype, grad, full)  # noqa: E731
                yield Case("attention", shape.name, direction, dtype, build)
    for shape in (SHAPES[4], SHAPES[5]):
        for direction in ("forward", "forward+backward"):
            for dtype in (torch.float32, torch.bfloat16) if full else (torch.float32,):
                build = lambda s=shape, t=dtype, d=direction: workload(s, t, d != "forward", padded=True)  # noqa: E731
                yield Case("attention", f"padded {shape.name}", direction, dtype, build)
    yield Case("attention", "call overhead 1x1", "forward", torch.float32, overhead_workload)
    if full:
        yield Case(
            "attention", "text to image, against flex", "forward", torch.float32, lambda: flex_workload(torch.float32)
        )


if __name__ == "__main__":
    main("attention", cases)
