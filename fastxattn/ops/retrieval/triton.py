"""The Triton kernel of retrieval: what it supports, and the operator it answers for."""

from __future__ import annotations

from typing import Any

import torch

from fastxattn.ops.retrieval import schema  # noqa: F401  (defines the operator)
from fastxattn.ops.retrieval.problem import Problem
from fastxattn.runtime import triton

MOST = 128  # a query's list lives in registers


def supports(problem: Problem) -> str | None:
    """None when the kernel runs this problem, else why not."""
    if (reason := triton.unavailable(torch.device(problem.device))) is not None:
        return reason
    if problem.dtype == torch.float64:
        return "computes in float32; the corpus is float64"
    if problem.k > MOST:
        return f"it needs k up to {MOST}, got {problem.k}"
    if torch.onnx.is_in_onnx_export():
        return "ONNX files hold retrieval as standard operators, which the reference is made of"
    return None


def _run(*arguments: Any) -> Any:
    from fastxattn.ops.retrieval.triton_kernel import topk_similarity

    return topk_similarity(*arguments)


for _key in ("CUDA", "CPU"):  # on CPU tensors: the interpreter
    torch.library.impl("fastxattn::topk_similarity_triton", _key, _run)
