"""The flash-attn package as a backend, when it is installed and the problem is one it knows."""

from __future__ import annotations

import functools
import importlib.util

import torch
from torch import Tensor

from fastxattn.ops.attention.problem import Problem
from fastxattn.runtime.operators import refuse

_KNOWN = ("query", "key", "value", "cu_seqlens_q", "cu_seqlens_k", "scale", "softcap", "dropout_seed")


@functools.cache
def _missing() -> str | None:
    if importlib.util.find_spec("flash_attn") is None:
        return "flash-attn is not installed; install it with `pip install fastxattn[flash-attn]`"
    return None


def supports(problem: Problem) -> str | None:
    """None when flash-attn runs this problem, else the reason why not."""
    if (reason := _missing()) is not None:
        return reason
    query, value = problem.query, problem.value
    if query.device.type != "cuda":
        return f"the tensors are on {query.device.type}"
    if query.dtype not in (torch.float16, torch.bfloat16):
        return f"it knows float16 and bfloat16, and the tensors are {query.dtype}"
    if problem.dropout_p:
        return "its dropout mask is not the one of the other backends"
    for name in Problem.names:
        x = getattr(problem, name)
        if name not in _KNOWN and (x != 0.0 if name in problem.numbers else x is not None):
            return f"it has no {name}"
    if query.shape[2] != value.shape[2]:
        return f"it needs value_dim equal to head_dim, got {value.shape[2]} and {query.shape[2]}"
    if query.shape[2] > 256 or query.shape[2] % 8:
        return f"it needs a head_dim up to 256 and divisible by 8, got {query.shape[2]}"
    return None


def attend(problem: Problem) -> tuple[Tensor, Tensor]:
    """Out and lse. The gradient of out is flash-attn's own; lse has none, and asking for it raises."""
    from flash_attn import flash_attn_varlen_func

    p = problem
    # The longest sequence is not known here without waiting for the device; the number of rows bounds it.
    longest = max(p.query.shape[0], 1), max(p.key.shape[0], 1)
    tensors = p.query, p.key, p.value, p.cu_seqlens_q, p.cu_seqlens_k
    options = {"softmax_scale": p.scale, "softcap": p.softcap}
    out, lse, *_ = flash_attn_varlen_func(*tensors, *longest, **options, return_attn_probs=True)
    # Rows without keys come back with lse = +inf or garbage, depending on the version.
    lse = torch.where(lse == torch.inf, -torch.inf, lse)
    message = "attention: backend='flash' has no gradient of lse; use another backend"
    return out, refuse(message, lse, (p.query, p.key))
