"""The attention operators' gradient, the same for every compiled backend."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastxattn.ops.attention.problem import Problem
from fastxattn.ops.attention.schema import NEEDS

FORWARD = {name: getattr(torch.ops.fastxattn, f"attention_{name}").default for name in ("cpu", "triton", "cuda")}
BACKWARD = {
    name: getattr(torch.ops.fastxattn, f"attention_backward_{name}").default for name in ("cpu", "triton", "cuda")
}
_TENSORS = Problem._fields.index("scale")  # the tensors before the numbers; the seed comes last


class Attention(torch.autograd.Function):
    """out, lse = Attention.apply(backend, *problem); saves the tensors of the problem and both results."""

    @staticmethod
    def forward(backend: str, *problem: Any) -> tuple[Tensor, Tensor]:
        """Run the backend's forward operator."""
        out, lse = FORWARD[backend](*problem)
        return out, lse

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        """Save what the backward operator needs."""
        backend, *arguments = inputs
        problem = Problem(*arguments)
        ctx.set_materialize_grads(False)
        ctx.backend = backend
        ctx.numbers = (problem.scale, problem.softcap, problem.dropout_p)
        ctx.save_for_backward(*problem[:_TENSORS], problem.dropout_seed, *output)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        """Gradients of query, key, value, key_bias and bias; None for everything else."""
        *tensors, seed, out, lse = ctx.saved_tensors
        if grad_out is None:
            grad_out = torch.zeros_like(out)
        elif grad_out.stride(2) != 1:  # the expanded scalar that sum() sends
            grad_out = grad_out.contiguous()
        needed = dict(zip(Problem._fields, ctx.needs_input_grad[1:], strict=True))
        needs = sum(bit for name, bit in NEEDS.items() if needed[name])
        grads = BACKWARD[ctx.backend](grad_out, grad_lse, out, lse, *tensors, *ctx.numbers, seed, needs)
        by_name = {name: grad if needed[name] else None for name, grad in zip(NEEDS, grads, strict=True)}
        return None, *(by_name.get(name) for name in Problem._fields)


def wants_gradient(problem: Problem) -> bool:
    """Whether autograd has to see this call."""
    return torch.is_grad_enabled() and any(
        t is not None and t.requires_grad
        for t in (problem.query, problem.key, problem.value, problem.key_bias, problem.bias)
    )
