"""Operators of late interaction and their derivative, the one place that saves tensors.

``maxsim`` returns ``sum_a`` (N, M) float32, the sum over a set's tokens of their best match in each set of b, and
``best_a`` (Ta, M) int32, its place in that set (-1: the set is empty); from b's tokens likewise ``sum_b`` (N, M) and
``best_b`` (Tb, N). What ``from_a`` or ``from_b`` leaves out has no rows. ``smooth_maxsim`` takes the smooth maximum
instead; its ``best`` are these maxima in float32, -inf where the set is empty. The backward operators take the
gradients of both sums and return float32 gradients of a and b, without rows where ``needs`` does not ask for them.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from fastxattn.ops.late_interaction.problem import Problem, SmoothProblem, smooth_of
from fastxattn.runtime.operators import KernelFunction, define, differentiable, first_order, needs_function, run

KINDS = {kind.operator: kind for kind in (Problem, SmoothProblem)}
BACKENDS = {"cpu": (Problem,), "triton": (Problem, SmoothProblem), "cuda": (Problem, SmoothProblem)}


def results(p: Problem) -> list[Tensor]:
    """The results of the forward operator, as they are where a set is empty."""
    n, m = p.sets
    kept, none = (torch.int32, -1) if smooth_of(p) is None else (torch.float32, float("-inf"))
    sums = [p.a.new_zeros((n if there else 0, m), dtype=torch.float32) for there in (p.from_a, p.from_b)]
    best = [
        x.new_full((x.shape[0] if there else 0, sets), none, dtype=kept)
        for x, sets, there in ((p.a, m, p.from_a), (p.b, n, p.from_b))
    ]
    return sums + best


def gradients(p: Problem, needs: int) -> list[Tensor]:
    """Zeros for the results of the backward operator."""
    return [
        x.new_zeros((x.shape[0] if needs & bit else 0, x.shape[1]), dtype=torch.float32)
        for x, bit in ((p.a, p.bits["a"]), (p.b, p.bits["b"]))
    ]


def operator(name: str, backend: str) -> Any:
    """``torch.ops.fastxattn.<name>_<backend>``."""
    return getattr(torch.ops.fastxattn, f"{name}_{backend}").default


class BestMatches(KernelFunction):
    """sum_a, sum_b, best_a, best_b = BestMatches.apply(name, backend, *problem); the last two have no gradient."""

    @staticmethod
    def forward(name: str, backend: str, *values: Any) -> tuple[Tensor, ...]:
        """One pass over the similarities for both directions."""
        return tuple(run(operator(name, backend), *values))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Save the problem and the best matches."""
        ctx.name, ctx.backend, *values = inputs
        ctx.mark_non_differentiable(*output[2:])
        KINDS[ctx.name].of(values).save(ctx, *output[2:])

    @staticmethod
    @first_order("maxsim")
    def backward(ctx: Any, saved: tuple[Any, ...], grad_a: Tensor, grad_b: Tensor, *_: None) -> tuple[Any, ...]:
        """Sparse: one row of the other side per token and set (all of its set's, under a smooth maximum)."""
        p, best = KINDS[ctx.name].restore(ctx, saved)
        needs = p.needs(ctx.needs_input_grad[2:])
        found = operator(f"{ctx.name}_backward", ctx.backend)(
            grad_a.contiguous(), grad_b.contiguous(), *best, *p.values(), needs
        )
        return None, None, *p.routed([g.to(p.a.dtype) for g in found], needs)


def best_matches(backend: str, p: Problem) -> tuple[Tensor, Tensor]:
    """Sums of best matches from both sides; a traced program keeps the operator, which has its derivative, whole."""
    if needs_function(p.a, p.b):
        return BestMatches.apply(p.operator, backend, *p.values())[:2]  # type: ignore[no-any-return]
    call = operator(p.operator, backend)
    return (call(*p.values()) if torch.compiler.is_compiling() else run(call, *p.values()))[:2]  # type: ignore[no-any-return]


def _fake(kind: type[Problem], *values: Any) -> tuple[Tensor, ...]:
    return tuple(results(kind.of(values)))


def _backward_fake(kind: type[Problem], *arguments: Any) -> tuple[Tensor, ...]:
    return tuple(gradients(kind.of(arguments[4:-1]), arguments[-1]))


for _backend, _kinds in BACKENDS.items():
    for _kind in _kinds:
        _name, _arguments = _kind.operator, _kind.schema()
        define(
            f"{_name}_{_backend}",
            f"({_arguments}) -> (Tensor sum_a, Tensor sum_b, Tensor best_a, Tensor best_b)",
            functools.partial(_fake, _kind),
        )
        define(
            f"{_name}_backward_{_backend}",
            f"(Tensor grad_a, Tensor grad_b, Tensor best_a, Tensor best_b, {_arguments}, int needs) "
            "-> (Tensor, Tensor)",
            functools.partial(_backward_fake, _kind),
        )
        differentiable(f"{_name}_{_backend}", functools.partial(BestMatches.apply, _name, _backend))
