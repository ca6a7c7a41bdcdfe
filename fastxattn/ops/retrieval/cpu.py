"""The C++ CPU kernel: what it supports."""

from __future__ import annotations

import torch

from fastxattn.ops.retrieval import schema  # noqa: F401  (defines the operator)
from fastxattn.ops.retrieval.problem import Problem
from fastxattn.runtime import native


def supports(problem: Problem) -> str | None:
    """None when the kernel runs this problem, else why not."""
    if problem.device != "cpu":
        return f"runs on the cpu; the corpus is on {problem.device}"
    if problem.dtype == torch.float64:
        return "computes in float32; the corpus is float64"
    if torch.compiler.is_compiling():
        return None  # a tracer cannot load a library; the operator's fake does
    return native.cpu_library().reason
