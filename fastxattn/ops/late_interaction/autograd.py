"""The autograd function of late interaction: the gradient flows along the best matches that the forward pass kept."""

from __future__ import annotations

from typing import Any

import torch

from fastxattn.ops.late_interaction.schema import NEEDS


class BestMatches(torch.autograd.Function):
    """Sums of best matches from a's tokens and from b's tokens, as the schema describes them."""

    @staticmethod
    def forward(
        ctx: Any,
        a: torch.Tensor,
        b: torch.Tensor,
        cu_a: torch.Tensor,
        cu_b: torch.Tensor,
        from_a: bool,
        from_b: bool,
        smooth: float | None,
        backend: str,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One pass over the similarities for both directions."""
        ctx.smooth, ctx.backend = () if smooth is None else (float(smooth),), backend
        sum_a, sum_b, best_a, best_b = BestMatches.operator(ctx, "")(a, b, cu_a, cu_b, from_a, from_b, *ctx.smooth)
        ctx.save_for_backward(best_a, best_b, a, b, cu_a, cu_b)
        ctx.directions = (from_a, from_b)
        return sum_a, sum_b

    @staticmethod
    def operator(ctx: Any, suffix: str) -> Any:
        """The forward operator of this call, or with ``_backward`` its gradient."""
        prefix = "smooth_" if ctx.smooth else ""
        return getattr(torch.ops.fastxattn, f"{prefix}maxsim{suffix}_{ctx.backend}")

    @staticmethod
    def backward(ctx: Any, grad_a: torch.Tensor, grad_b: torch.Tensor) -> tuple[Any, ...]:
        """Sparse: one row of the other side per token and set (all of its set's, under a smooth maximum)."""
        wanted = ctx.needs_input_grad
        needs = NEEDS["a"] * wanted[0] + NEEDS["b"] * wanted[1]
        out_a, out_b = BestMatches.operator(ctx, "_backward")(
            grad_a.contiguous(), grad_b.contiguous(), *ctx.saved_tensors, *ctx.directions, needs, *ctx.smooth
        )
        dtype = ctx.saved_tensors[2].dtype
        return out_a.to(dtype) if wanted[0] else None, out_b.to(dtype) if wanted[1] else None, *[None] * 6
