"""The attention operators' gradient, the same for every compiled backend."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from fastxattn.ops.attention.problem import Problem
from fastxattn.ops.attention.schema import NEEDS
from fastxattn.runtime.operators import KernelFunction, differentiable, first_order, needs_function, run

FORWARD = {name: getattr(torch.ops.fastxattn, f"attention_{name}").default for name in ("cpu", "triton", "cuda")}
BACKWARD = {
    name: getattr(torch.ops.fastxattn, f"attention_backward_{name}").default for name in ("cpu", "triton", "cuda")
}
_TENSORS = Problem._fields.index("scale")  # the tensors before the numbers; the seed comes last


class Attention(KernelFunction):
    """out, lse = Attention.apply(backend, *problem); saves the tensors of the problem and both results."""

    @staticmethod
    def forward(backend: str, *problem: Any) -> tuple[Tensor, Tensor]:
        """Run the backend's forward operator."""
        out, lse = run(FORWARD[backend], *problem)
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
    @first_order("attention")
    def backward(
        ctx: Any, saved: tuple[Any, ...], grad_out: Tensor | None, grad_lse: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        """Gradients of query, key, value, key_bias and bias; None for everything else."""
        *tensors, seed, out, lse = saved
        if grad_out is None:
            grad_out = torch.zeros_like(out)
        elif grad_out.stride(2) != 1:  # the expanded scalar that sum() sends
            grad_out = grad_out.contiguous()
        grad_lse = None if grad_lse is None else grad_lse.float()  # lse may have come in float64
        needed = dict(zip(Problem._fields, ctx.needs_input_grad[1:], strict=True))
        needs = sum(bit for name, bit in NEEDS.items() if needed[name])
        grads = BACKWARD[ctx.backend](grad_out, grad_lse, out, lse, *tensors, *ctx.numbers, seed, needs)
        by_name = {name: grad if needed[name] else None for name, grad in zip(NEEDS, grads, strict=True)}
        return None, *(by_name.get(name) for name in Problem._fields)


def wants_gradient(problem: Problem) -> bool:
    """Whether autograd has to see this call."""
    return needs_function(problem.query, problem.key, problem.value, problem.key_bias, problem.bias)


for _backend in FORWARD:
    differentiable(f"attention_{_backend}", functools.partial(Attention.apply, _backend))
