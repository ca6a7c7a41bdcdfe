"""Triton kernels of the attention op: ``forward``/``backward`` (device), ``launch`` (host), ``config`` (tile sizes).

Importing this package imports no Triton: the kernels come with the first call. They run on CUDA and ROCm devices, and
on CPU tensors under Triton's interpreter (``TRITON_INTERPRET=1``), which is slow and meant for tests.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from typing import Any

import torch
from torch import Tensor

from fastxattn.ops.attention import schema  # noqa: F401  (defines the operators)
from fastxattn.ops.attention.problem import Problem

_OLDEST = (8, 0)


@functools.cache
def interpreted() -> bool:
    """Whether Triton interprets kernels in this process."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


@functools.cache
def _missing() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed; install it with `pip install fastxattn[triton]`"
    return None


def supports(problem: Problem) -> str | None:
    """None when the kernels run this problem, else the reason why not."""
    query = problem.query
    device = query.device.type
    if device == "cpu" and not interpreted():
        return "the tensors are on cpu, and TRITON_INTERPRET=1 is not set"
    if device not in ("cpu", "cuda"):
        return f"the tensors are on {device}"
    if (reason := _missing()) is not None:
        return reason
    if query.dtype == torch.float64:
        return "it computes in float32, and the tensors are float64"
    if query.shape[2] > 256 or problem.value.shape[2] > 256:
        return f"it needs head_dim and value_dim up to 256, got {query.shape[2]} and {problem.value.shape[2]}"
    return None if device == "cpu" else _too_old(query.device)


def _too_old(device: torch.device) -> str | None:
    if torch.version.hip is not None or not torch.cuda.is_available():  # fake tensors have no device to ask
        return None
    capability = torch.cuda.get_device_capability(device)
    if capability < _OLDEST:
        return f"it needs compute capability 8.0, and the device has {capability[0]}.{capability[1]}"
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
