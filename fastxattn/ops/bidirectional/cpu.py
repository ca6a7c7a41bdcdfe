"""The C++ kernel for CPUs: one pass over the scores, forward and backward. It supports what attention's does."""

from __future__ import annotations

from fastxattn.ops.bidirectional.problem import BidirectionalProblem


def pays(problem: BidirectionalProblem) -> bool:
    """Whether one pass is faster than two calls of the attention kernel."""
    return True
