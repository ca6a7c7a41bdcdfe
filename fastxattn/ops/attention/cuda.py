"""The CUDA C++ kernels: what they support. ``attention_cuda`` launches ``libfastxattn_cuda.so`` with the first call."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastxattn.ops.attention import schema  # noqa: F401  (defines the operators)
from fastxattn.ops.attention.problem import Problem
from fastxattn.runtime import cuda


def supports(problem: Problem) -> str | None:
    """None when the kernels run this problem, else the reason why not."""
    query = problem.query
    if query.dtype == torch.float64:
        return "it computes in float32, and the tensors are float64"
    most = 128 if query.dtype == torch.float32 else 256
    if query.shape[2] > most or problem.value.shape[2] > most:
        dims = f"{query.shape[2]} and {problem.value.shape[2]}"
        return f"it needs head_dim and value_dim up to {most} with {query.dtype}, got {dims}"
    for name, there in (("bias", problem.bias is not None), ("dropout", bool(problem.dropout_p))):
        if there:
            return f"it has no {name}"
    return cuda.unavailable(query.device)


def _forward(*arguments: Any) -> tuple[Tensor, Tensor]:
    from fastxattn.ops.attention.cuda_launch import attention_forward

    return attention_forward(*arguments)


def _backward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    from fastxattn.ops.attention.cuda_launch import attention_backward

    return attention_backward(*arguments)


torch.library.impl("fastxattn::attention_cuda", "CUDA", _forward)
torch.library.impl("fastxattn::attention_backward_cuda", "CUDA", _backward)
