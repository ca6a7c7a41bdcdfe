"""Operators of absorbed attention: schema, fakes and gradient.

Forward returns ``out`` like ``query``, ``lse`` (heads, rows_q) float32, and ``softmax`` (2, heads, rows_q) float32,
from which backward computes the weights again: the largest score of each row, and the sum of exp(score - largest).
Backward returns one gradient per differentiable field of the problem; those not asked for hold nothing of meaning.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from fastxattn.ops.absorbed_attention.checks import check
from fastxattn.ops.absorbed_attention.problem import Problem
from fastxattn.runtime.operators import KernelFunction, define, differentiable, first_order, run

_FORWARD = f"({Problem.schema()}) -> (Tensor out, Tensor lse, Tensor softmax)"
_BACKWARD = (
    f"(Tensor grad_out, Tensor? grad_lse, Tensor out, Tensor lse, Tensor softmax, {Problem.schema()}, int needs) -> "
    f"({', '.join(f'Tensor grad_{name}' for name in Problem.bits)})"
)


def _fake_forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    problem = Problem.of(arguments)
    check(problem)
    query = problem.query
    rows, heads, width = query.shape
    lse = query.new_empty(heads, rows, dtype=torch.float32)
    return query.new_empty(rows, heads, width), lse, lse.new_empty(2, heads, rows)


def _fake_backward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    _, _, _, lse, _, *fields, needs = arguments
    p, bits = Problem.of(fields), Problem.bits
    bias = p.key_bias is not None and bool(needs & bits["key_bias"])
    by_key = bool(needs & bits["context"]) or bias
    return (
        p.query.new_empty(p.query.shape if needs & bits["query"] else (0,)),
        p.context.new_empty(p.context.shape if by_key else (0,)),
        lse.new_empty(p.context.shape[:1] if bias else (0,)),
    )


define("absorbed_attention_cpu", _FORWARD, _fake_forward)
define("absorbed_attention_backward_cpu", _BACKWARD, _fake_backward)

FORWARD = {"cpu": torch.ops.fastxattn.absorbed_attention_cpu.default}
BACKWARD = {"cpu": torch.ops.fastxattn.absorbed_attention_backward_cpu.default}


class AbsorbedAttention(KernelFunction):
    """out, lse, softmax = AbsorbedAttention.apply(backend, *problem.values()); no gradient goes through the last."""

    @staticmethod
    def forward(backend: str, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Run the backend's forward operator."""
        out, lse, softmax = run(FORWARD[backend], *arguments)
        return out, lse, softmax

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Save what the backward operator needs."""
        ctx.backend, *arguments = inputs
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(output[2])
        Problem.of(arguments).save(ctx, *output)

    @staticmethod
    @first_order("absorbed_attention")
    def backward(
        ctx: Any, saved: tuple[Any, ...], grad_out: Tensor | None, grad_lse: Tensor | None, _: None
    ) -> tuple[Tensor | None, ...]:
        """Gradients of query, context and key_bias, those that are needed."""
        problem, (out, lse, softmax) = Problem.restore(ctx, saved)
        needs = Problem.needs(ctx.needs_input_grad[1:])
        grad_out = torch.zeros_like(out) if grad_out is None else grad_out.contiguous()
        grad_lse = None if grad_lse is None else grad_lse.contiguous()
        grads = BACKWARD[ctx.backend](grad_out, grad_lse, out, lse, softmax, *problem.values(), needs)
        return None, *Problem.routed(grads, needs)


for _backend in FORWARD:
    differentiable(f"absorbed_attention_{_backend}", functools.partial(AbsorbedAttention.apply, _backend))
