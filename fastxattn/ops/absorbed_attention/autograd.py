"""The gradient of context attention, for every compiled backend."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from fastxattn.ops.absorbed_attention.schema import NEEDS
from fastxattn.runtime.operators import KernelFunction, differentiable, first_order, run

FORWARD = {"cpu": torch.ops.fastxattn.absorbed_attention_cpu.default}
BACKWARD = {"cpu": torch.ops.fastxattn.absorbed_attention_backward_cpu.default}


class AbsorbedAttention(KernelFunction):
    """out, lse, softmax = AbsorbedAttention.apply(backend, *problem); no gradient goes through the last."""

    @staticmethod
    def forward(backend: str, *problem: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Run the backend's forward operator."""
        out, lse, softmax = run(FORWARD[backend], *problem)
        return out, lse, softmax

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Save what the backward operator needs."""
        ctx.backend, *tensors, ctx.scale = inputs
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(output[2])
        ctx.save_for_backward(*tensors, *output)

    @staticmethod
    @first_order("absorbed_attention")
    def backward(
        ctx: Any, saved: tuple[Any, ...], grad_out: Tensor | None, grad_lse: Tensor | None, _: None
    ) -> tuple[Tensor | None, ...]:
        """Gradients of query, context and key_bias, those that are needed."""
        *problem, out, lse, softmax = saved
        wanted = dict(zip(NEEDS, (ctx.needs_input_grad[i] for i in (1, 2, 6)), strict=True))
        needs = sum(NEEDS[name] for name, want in wanted.items() if want)
        grad_out = torch.zeros_like(out) if grad_out is None else grad_out.contiguous()
        grad_lse = None if grad_lse is None else grad_lse.contiguous()
        grads = BACKWARD[ctx.backend](grad_out, grad_lse, out, lse, softmax, *problem, ctx.scale, needs)
        query, context, key_bias = (g if want else None for g, want in zip(grads, wanted.values(), strict=True))
        return None, query, context, None, None, None, key_bias, None


for _backend in FORWARD:
    differentiable(f"absorbed_attention_{_backend}", functools.partial(AbsorbedAttention.apply, _backend))
