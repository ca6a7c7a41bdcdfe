"""Co-attention on the CPU: one pass over the scores, against two calls of attention and against eager PyTorch.

    python -m benchmarks.bench_co_attention [--match TEXT] [--full] [--rounds N]

Eager is GroundingDINO's way: one product, a softmax along each axis, two products; it gets the batch padded and masked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import main, nbytes
from benchmarks.harness import Case, Workload
from fastxattn.ops.co_attention import backends
from fastxattn.ops.co_attention.problem import Problem
from fastxattn.ops.co_attention.reference import co_attention_reference
from fastxattn.runtime import native
from fastxattn.testing import measure_error

SHAPES = {
    "LXMERT, 32 x (36 boxes, 5..20 words), 12 x 64": ([36] * 32, [5 + i % 16 for i in range(32)], 12, 64),
    "2 x (1024 patches, 40 and 77 words), 12 x 64": ([1024] * 2, [40, 77], 12, 64),
    "GroundingDINO, 1 x (2000 pixels, 64 words), 4 x 256": ([2000], [64], 4, 256),
    "1 x (1024, 1024), 4 x 64": ([1024], [1024], 4, 64),
}


def padded(x: Tensor, lengths: list[int]) -> Tensor:
    """(batch, heads, longest, dim)."""
    return torch.nn.utils.rnn.pad_sequence(x.split(lengths), batch_first=True).transpose(1, 2).contiguous()


def eager(problem: list[Tensor], hidden: list[Tensor], scale: float) -> tuple[Tensor, Tensor]:
    """Padded outputs of both sides."""
    query_a, query_b, value_a, value_b = problem
    scores = query_a @ query_b.mT * scale
    out_a = scores.masked_fill(hidden[1][:, None, None], -torch.inf).softmax(-1) @ value_b
    return out_a, scores.masked_fill(hidden[0][:, None, :, None], -torch.inf).softmax(-2).mT @ value_a


def problem_of(sides: list[Tensor], offsets: list[Tensor], scale: float) -> Problem:
    """Queries of a and b, values of a and b, offsets of a and b."""
    return Problem(**dict(zip(Problem.names, (*sides, *offsets), strict=False)), scale=scale)


def workload(dtype: torch.dtype, grad: bool, of_a: list[int], of_b: list[int], heads: int, dim: int) -> Workload:
    g = torch.Generator().manual_seed(0)
    tensors = [
        torch.randn(sum(n), heads, dim, generator=g).to(dtype).requires_grad_(grad) for n in (of_a, of_b, of_a, of_b)
    ]
    offsets = [torch.tensor([0, *torch.tensor(n).cumsum(0).tolist()], dtype=torch.int32) for n in (of_a, of_b)]
    problem = problem_of(tensors, offsets, dim**-0.5)
    wide = [padded(t.detach(), n).requires_grad_(grad) for t, n in zip(tensors, (of_a, of_b) * 2, strict=True)]
    hidden = [torch.arange(max(n)) >= torch.tensor(n)[:, None] for n in (of_a, of_b)]

    def provider(call: Callable[[], tuple[Tensor, Tensor]], leaves: list[Tensor]) -> Callable[[], Any]:
        def forward_backward() -> Any:
            outs = call()
            return torch.autograd.grad(outs, leaves, [out.detach() for out in outs])

        return forward_backward if grad else call

    def check() -> str:
        first = [t.detach()[: n[0]].requires_grad_(grad) for t, n in zip(tensors, (of_a, of_b) * 2, strict=True)]
        ends = [o[:2].contiguous() for o in offsets]

        def results(run: Callable[[Problem], tuple[Tensor, Tensor]], given: list[Tensor]) -> list[Tensor]:
            outs = run(problem_of(given, ends, problem.scale))
            return [*outs, *(torch.autograd.grad(outs, given, [o.detach() for o in outs]) if grad else ())]

        found = results(lambda p: backends.one_pass("cpu", p), first)
        exact = results(co_attention_reference, [t.detach().double().requires_grad_(grad) for t in first])
        plain = results(co_attention_reference, first)
        for i, (mine, reference, yardstick) in enumerate(zip(found, exact, plain, strict=True)):
            report = measure_error(f"result {i}", mine, reference, yardstick, backward=i > 1)
            if not report.ok:
                return str(report)
        return "ok"

    pairs = sum(a * b for a, b in zip(of_a, of_b, strict=True))
    return Workload(
        {
            "fastxattn cpu": provider(lambda: backends.one_pass("cpu", problem), tensors),
            "two calls": provider(lambda: backends.two_calls("cpu", problem), tensors),
            "eager": provider(lambda: eager(wide, hidden, problem.scale), wide),
        },
        rival="two calls",
        check=check,
        flops=2.0 * pairs * heads * dim * (3 + 7 * grad),
        bytes=nbytes(*tensors, *tensors[:2]) * (3 if grad else 1),
    )


def cases(full: bool = False) -> Iterator[Case]:
    for name, shape in SHAPES.items():
        for dtype in (torch.float32, torch.bfloat16):
            for grad in (False, True):
                build = lambda dtype=dtype, grad=grad, shape=shape: workload(dtype, grad, *shape)  # noqa: E731
                yield Case("co_attention", name, "forward+backward" if grad else "forward", dtype, build)


if __name__ == "__main__":
    if reason := native.cpu_library().reason:
        raise SystemExit(f"bench_co_attention: {reason}")
    main("co_attention", cases)
