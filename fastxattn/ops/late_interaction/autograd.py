"""The gradient of late interaction: it flows along the best matches that the forward pass kept."""

from __future__ import annotations

import functools
from typing import Any

import torch

from fastxattn.ops.late_interaction.schema import NEEDS, OPERATORS, SMOOTH
from fastxattn.runtime.operators import KernelFunction, differentiable, first_order, run


def operator(name: str, backend: str) -> Any:
    """``torch.ops.fastxattn.<name>_<backend>``."""
    return getattr(torch.ops.fastxattn, f"{name}_{backend}").default


class BestMatches(KernelFunction):
    """sum_a, sum_b, best_a, best_b = BestMatches.apply(name, backend, *arguments); the last two have no gradient.

    ``name`` is maxsim or smooth_maxsim; the schema describes arguments and results.
    """

    @staticmethod
    def forward(name: str, backend: str, *arguments: Any) -> tuple[torch.Tensor, ...]:
        """One pass over the similarities for both directions."""
        return tuple(run(operator(name, backend), *arguments))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
        """Save the tokens and the best matches."""
        ctx.name, ctx.backend, *arguments = inputs
        ctx.directions, ctx.smooth = arguments[4:6], arguments[6:]
        ctx.mark_non_differentiable(*output[2:])
        ctx.save_for_backward(*output[2:], *arguments[:4])

    @staticmethod
    @first_order("maxsim")
    def backward(
        ctx: Any, saved: tuple[Any, ...], grad_a: torch.Tensor, grad_b: torch.Tensor, *_: None
    ) -> tuple[Any, ...]:
        """Sparse: one row of the other side per token and set (all of its set's, under a smooth maximum)."""
        _, _, *wanted = ctx.needs_input_grad
        needs = NEEDS["a"] * wanted[0] + NEEDS["b"] * wanted[1]
        out_a, out_b = operator(f"{ctx.name}_backward", ctx.backend)(
            grad_a.contiguous(), grad_b.contiguous(), *saved, *ctx.directions, needs, *ctx.smooth
        )
        dtype = saved[2].dtype
        grads = out_a.to(dtype) if wanted[0] else None, out_b.to(dtype) if wanted[1] else None
        return None, None, *grads, *[None] * (len(wanted) - 2)


for _backend, _operators in (("cpu", OPERATORS), ("triton", SMOOTH), ("cuda", SMOOTH)):
    for _name in _operators:
        if not _name.endswith("backward"):
            differentiable(f"{_name}_{_backend}", functools.partial(BestMatches.apply, _name, _backend))
