"""Triton kernels of the attention op: ``forward``/``backward`` (device), ``launch`` (host), ``config`` (tile sizes).

Importing this package imports no Triton: the kernels come with the first call. They run on CUDA and ROCm devices, and
on CPU tensors under Triton's interpreter (``TRITON_INTERPRET=1``), which is slow and meant for tests.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastxattn.ops.attention import schema  # noqa: F401  (defines the operators)
from fastxattn.ops.attention.problem import Problem
from fastxattn.runtime import triton


def supports(problem: Problem) -> str | None:
    """None when the kernels run this problem, else the reason why not."""
    query = problem.query
    if (reason := triton.unavailable(query.device)) is not None:
        return reason
    if query.dtype == torch.float64:
        return "it computes in float32, and the tensors are float64"
    if query.shape[2] > 256 or problem.value.shape[2] > 256:
        return f"it needs head_dim and value_dim up to 256, got {query.shape[2]} and {problem.value.shape[2]}"
    return None


def _forward(*arguments: Any) -> tuple[Tensor, Tensor]:
    from fastxattn.ops.attention.triton.launch import attention_forward

    return attention_forward(*arguments)


def _backward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    from fastxattn.ops.attention.triton.launch import attention_backward

    return attention_backward(*arguments)


for _key in ("CUDA", "CPU"):  # on CPU tensors: the interpreter
    torch.library.impl("fastxattn::attention_triton", _key, _forward)
    torch.library.impl("fastxattn::attention_backward_triton", _key, _backward)
