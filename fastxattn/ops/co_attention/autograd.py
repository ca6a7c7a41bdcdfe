"""The co-attention operators' gradient, the same for every compiled backend."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from fastxattn.ops.co_attention.problem import CoAttentionProblem
from fastxattn.ops.co_attention.schema import NEEDS
from fastxattn.runtime.operators import KernelFunction, differentiable, first_order, run

FORWARD = {name: getattr(torch.ops.fastxattn, f"co_attention_{name}").default for name in ("cpu", "triton")}
BACKWARD = {name: getattr(torch.ops.fastxattn, f"co_attention_backward_{name}").default for name in ("cpu", "triton")}
_TENSORS = CoAttentionProblem._fields.index("scale")


class CoAttention(KernelFunction):
    """out_a, out_b, lse_a, lse_b = CoAttention.apply(backend, *problem); no gradient goes through the last two."""

    @staticmethod
    def forward(backend: str, *problem: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Run the backend's forward operator."""
        out_a, out_b, lse_a, lse_b = run(FORWARD[backend], *problem)
        return out_a, out_b, lse_a, lse_b

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Save what the backward operator needs."""
        backend, *arguments = inputs
        problem = CoAttentionProblem(*arguments)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*output[2:])
        ctx.backend = backend
        ctx.numbers = (problem.scale, problem.softcap, problem.dropout_p)
        ctx.save_for_backward(*problem[:_TENSORS], problem.dropout_seed, *output)

    @staticmethod
    @first_order("co-attention")
    def backward(
        ctx: Any, saved: tuple[Any, ...], grad_a: Tensor | None, grad_b: Tensor | None, *_: None
    ) -> tuple[Tensor | None, ...]:
        """Gradients of queries, values and biases."""
        *fields, out_a, out_b, lse_a, lse_b = saved
        problem = CoAttentionProblem._make([*fields[:_TENSORS], *ctx.numbers, fields[_TENSORS]])
        outs = [
            torch.zeros_like(out) if grad is None else grad if grad.stride(2) == 1 else grad.contiguous()
            for grad, out in ((grad_a, out_a), (grad_b, out_b))
        ]
        needed = dict(zip(CoAttentionProblem._fields, ctx.needs_input_grad[1:], strict=True))
        needs = sum(bit for name, bit in NEEDS.items() if needed[name])
        grads = dict(zip(NEEDS, BACKWARD[ctx.backend](*outs, out_a, out_b, lse_a, lse_b, *problem, needs), strict=True))
        for name in ("bias_a", "bias_b"):
            bias = getattr(problem, name)
            if needed[name] and bias is not None:
                grads[name] = grads[name].T if bias.ndim == 2 else grads[name].sum(0)
        return None, *(grads[name] if needed[name] else None for name in CoAttentionProblem._fields)


for _backend in FORWARD:
    differentiable(f"co_attention_{_backend}", functools.partial(CoAttention.apply, _backend))
