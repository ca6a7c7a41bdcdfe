"""The CUDA C++ kernel of late interaction: best matches in both directions from one pass."""

from __future__ import annotations

import torch
from torch import Tensor

from fastxattn.ops.late_interaction import schema, triton
from fastxattn.ops.late_interaction.cpu import Problem
from fastxattn.runtime import cuda


def supports(problem: Problem) -> str | None:
    """None when the kernel runs this problem, else why not."""
    if problem.smooth is not None:
        return "has no smooth maximum"
    if (reason := cuda.unavailable(torch.device(problem.device))) is not None:
        return reason
    reason = triton.supports(problem)
    return None if reason is None else f"its gradient is a Triton kernel: {reason}"


def maxsim(a: Tensor, b: Tensor, cu_a: Tensor, cu_b: Tensor, from_a: bool, from_b: bool) -> tuple[Tensor, ...]:
    """As the schema says."""
    n, m = cu_a.shape[0] - 1, cu_b.shape[0] - 1
    results = [
        torch.zeros((n if wanted else 0, m), dtype=torch.float32, device=a.device) for wanted in (from_a, from_b)
    ] + [
        torch.full((x.shape[0] if wanted else 0, others), -1, dtype=torch.int32, device=a.device)
        for x, others, wanted in ((a, m, from_a), (b, n, from_b))
    ]
    if n and m:
        sum_a, sum_b, best_a, best_b = (
            t if wanted else None for t, wanted in zip(results, (from_a, from_b) * 2, strict=True)
        )
        cuda.launch("maxsim", sum_a, sum_b, best_a, best_b, a, b, cu_a, cu_b, cuda.aligned(a, b))
    return tuple(results)


def maxsim_backward(*arguments: object) -> tuple[Tensor, Tensor]:
    """As the schema says; the Triton kernel's work."""
    result: tuple[Tensor, Tensor] = torch.ops.fastxattn.maxsim_backward_triton(*arguments)
    return result


for _name in schema.OPERATORS:
    torch.library.impl(f"fastxattn::{_name}_cuda", "CUDA", globals()[_name])
