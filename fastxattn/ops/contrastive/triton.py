"""Triton kernels: what they support."""

from __future__ import annotations

from fastxattn.ops.contrastive.problem import Problem


def supports(problem: Problem) -> str | None:
    """None when the kernels run this problem, else why not."""
    return "there is no Triton kernel of the contrastive losses in this version"
