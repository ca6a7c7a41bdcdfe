"""The C++ kernel for CPUs: it supports what the attention kernel does."""

from __future__ import annotations

from fastxattn.ops.attention import cpu
from fastxattn.ops.importance import schema  # noqa: F401  (defines the operator)
from fastxattn.ops.importance.problem import ImportanceProblem


def supports(problem: ImportanceProblem) -> str | None:
    """None when the kernel runs this problem, else the reason why not."""
    return cpu.supports(problem.attention())
