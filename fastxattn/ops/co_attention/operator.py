"""Operators of co-attention: schema, fakes and gradient.

Forward returns ``out_a`` (total_a, heads, value_dim_b), ``out_b`` (total_b, heads, value_dim_a) and the log-sum-exps
``lse_a`` and ``lse_b`` (heads, tokens) float32. Backward returns one gradient per differentiable field of the problem;
those not asked for are empty, and those of the biases are (heads, tokens) float32 whatever shape the bias has.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from fastxattn.ops.co_attention.checks import check_shapes
from fastxattn.ops.co_attention.problem import Problem
from fastxattn.runtime.operators import KernelFunction, define, differentiable, first_order, run

RESULTS = ("out_a", "out_b", "lse_a", "lse_b")
_SAVED = ", ".join(f"Tensor {name}" for name in ("grad_out_a", "grad_out_b", *RESULTS))
_GRADS = ", ".join(f"Tensor grad_{name}" for name in Problem.bits)
_FORWARD = f"({Problem.schema()}) -> ({', '.join(f'Tensor {name}' for name in RESULTS)})"
_BACKWARD = f"({_SAVED}, {Problem.schema()}, int needs) -> ({_GRADS})"


def _fake_forward(*arguments: Any) -> tuple[Tensor, ...]:
    p = Problem.of(arguments)
    check_shapes(p)
    sides = ((p.query_a, p.value_b), (p.query_b, p.value_a))
    outs = [query.new_empty(*query.shape[:2], value.shape[2]) for query, value in sides]
    return *outs, *(query.new_empty(query.shape[1], query.shape[0], dtype=torch.float32) for query, _ in sides)


def _fake_backward(*arguments: Any) -> tuple[Tensor, ...]:
    _, _, _, _, lse_a, lse_b, *fields, needs = arguments
    problem = Problem.of(fields)
    biases = {"key_bias_a": lse_a, "key_bias_b": lse_b}
    like = {name: biases.get(name, getattr(problem, name)) for name in Problem.bits}
    return tuple(t.new_empty(t.shape if needs & Problem.bits[name] else (0,)) for name, t in like.items())


for _backend in ("cpu", "triton"):
    define(f"co_attention_{_backend}", _FORWARD, _fake_forward)
    define(f"co_attention_backward_{_backend}", _BACKWARD, _fake_backward)

FORWARD = {name: getattr(torch.ops.fastxattn, f"co_attention_{name}").default for name in ("cpu", "triton")}
BACKWARD = {name: getattr(torch.ops.fastxattn, f"co_attention_backward_{name}").default for name in ("cpu", "triton")}


class CoAttention(KernelFunction):
    """out_a, out_b, lse_a, lse_b = CoAttention.apply(backend, *problem.values()).

    No gradient goes through the last two.
    """

    @staticmethod
    def forward(backend: str, *arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Run the backend's forward operator."""
        out_a, out_b, lse_a, lse_b = run(FORWARD[backend], *arguments)
        return out_a, out_b, lse_a, lse_b

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Save what the backward operator needs."""
        ctx.backend, *arguments = inputs
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*output[2:])
        Problem.of(arguments).save(ctx, *output)

    @staticmethod
    @first_order("co-attention")
    def backward(
        ctx: Any, saved: tuple[Any, ...], grad_a: Tensor | None, grad_b: Tensor | None, *_: None
    ) -> tuple[Tensor | None, ...]:
        """Gradients of queries, values and biases."""
        problem, results = Problem.restore(ctx, saved)
        outs = [
            torch.zeros_like(out) if grad is None else grad if grad.stride(2) == 1 else grad.contiguous()
            for grad, out in zip((grad_a, grad_b), results, strict=False)
        ]
        needs = Problem.needs(ctx.needs_input_grad[1:])
        grads = dict(zip(Problem.bits, BACKWARD[ctx.backend](*outs, *results, *problem.values(), needs), strict=True))
        for name in ("key_bias_a", "key_bias_b"):
            bias = getattr(problem, name)
            if needs & Problem.bits[name] and bias is not None:
                grads[name] = grads[name].T if bias.ndim == 2 else grads[name].sum(0)
        return None, *Problem.routed(list(grads.values()), needs)


for _backend in FORWARD:
    differentiable(f"co_attention_{_backend}", functools.partial(CoAttention.apply, _backend))
