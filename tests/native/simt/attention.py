"""The CUDA attention kernels under the SIMT runner as a differentiable ``run`` for the attention contract."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from simt.build import Simt
from torch import Tensor

from fastxattn.ops.attention.kernels_cuda import Plan, sum_by_row
from fastxattn.ops.attention.problem import Problem

TENSORS = (
    "cu_seqlens_q", "cu_seqlens_k", "seqused_q", "seqused_k", "query_index", "key_index", "kv_range", "key_bias",
)  # fmt: skip


def as_array(t: Tensor | None) -> np.ndarray | None:
    """A NumPy view of a tensor's memory; bfloat16 and float16 as uint16."""
    if t is None:
        return None
    t = t.detach()
    return t.view(torch.int16).numpy().view(np.uint16) if t.element_size() == 2 else t.numpy()


def arguments(problem: Problem, plan: Plan, order: int) -> dict[str, Any]:
    """The keywords common to forward and backward."""
    given = {name: as_array(getattr(problem, name)) for name in ("query", "key", "value", *TENSORS)}
    return given | {
        "scale": problem.scale, "softcap": problem.softcap, "aligned": plan.aligned, "order": order,
    }  # fmt: skip


class Attention(torch.autograd.Function):
    """Forward and backward on the runner."""

    @staticmethod
    def forward(ctx: Any, simt: Simt, kernel: str, order: int, counts: list, *fields: Any) -> Any:
        problem = Problem.of(fields)
        plan = Plan.of(problem)
        out, lse = plan.results()
        part_out, part_lse = plan.parts()
        name = str(problem.query.dtype).removeprefix("torch.")
        counts.append(
            getattr(simt, f"{kernel}_{name}")(
                **arguments(problem, plan, order), out=as_array(out), lse=as_array(lse), part_out=as_array(part_out),
                part_lse=as_array(part_lse),
            )
        )  # fmt: skip
        ctx.save_for_backward(*(f if isinstance(f, Tensor) else None for f in fields), out, lse)
        ctx.rest = (simt, order, counts, name, problem)
        return out, lse

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor, grad_lse: Tensor) -> Any:
        simt, order, counts, name, problem = ctx.rest
        *_, out, lse = ctx.saved_tensors
        plan = Plan.of(problem, grad_out)
        grads = plan.gradients(sum(problem.bits.values()))
        counts.append(
            getattr(simt, f"attention_backward_{name}")(
                **arguments(problem, plan, order), out=as_array(out), lse=as_array(lse), grad_out=as_array(grad_out),
                grad_lse=as_array(grad_lse.contiguous()), **{k: as_array(v) for k, v in grads.items()},
            )
        )  # fmt: skip
        final = sum_by_row(problem, grads)
        return None, None, None, None, *(final.get(field) for field in Problem.names)


def runs_on(simt: Simt, order: int = 0, counts: list | None = None, kernel: str = "attention") -> Any:
    """``run(problem)`` for fastxattn.testing.attention; ``kernel`` names the forward, attention or attention_wgmma."""
    return lambda problem: Attention.apply(simt, kernel, order, [] if counts is None else counts, *problem.values())
