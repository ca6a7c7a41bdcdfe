"""The autograd functions over the fused operators: the one place that saves tensors."""

from __future__ import annotations

from typing import Any

import torch

from fastxattn.ops.contrastive.schema import GRADS, NEEDS, WIDE

Optional = torch.Tensor | None


def operator(name: str, backend: str) -> Any:
    """``torch.ops.fastxattn.<name>_<backend>``."""
    return getattr(torch.ops.fastxattn, f"{name}_{backend}")


class PairStats(torch.autograd.Function):
    """Row and column statistics (:data:`fastxattn.ops.contrastive.schema.STATS`) of the similarity matrix.

    Kernels read the features in ``dtype``. Features of 16 bits that come widened to float32 get gradients in float32:
    where several parts of a loss meet, each would else be rounded before they add up.
    """

    @staticmethod
    def forward(
        ctx: Any,
        a: torch.Tensor,
        b: torch.Tensor,
        scale: torch.Tensor,
        norm_a: Optional,
        norm_b: Optional,
        id_a: torch.Tensor,
        id_b: torch.Tensor,
        skip_a: Optional,
        skip_b: Optional,
        exact: Optional,
        limit_row: Optional,
        limit_col: Optional,
        rank_row: Optional,
        rank_col: Optional,
        exclude_self: bool,
        rows: bool,
        columns: bool,
        means: bool,
        dtype: torch.dtype,
        backend: str,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Arguments as in the schema; ``rows`` and ``columns`` say which directions are wanted."""
        ctx.dtypes = a.dtype, b.dtype
        a, b = a.to(dtype), b.to(dtype)
        problem = (a, b, scale, None, norm_a, norm_b, id_a, id_b, skip_a, skip_b, exact, exclude_self)
        stats = operator("contrastive_stats", backend)(
            *problem, limit_row, limit_col, rank_row, rank_col, rows, columns, means
        )
        ctx.save_for_backward(
            *stats, a, b, scale, norm_a, norm_b, id_a, id_b, skip_a, skip_b, exact, limit_row, limit_col
        )
        ctx.flags = (exclude_self, rows, columns, backend)
        return stats[0], stats[1]

    @staticmethod
    def backward(ctx: Any, grad_row: torch.Tensor, grad_col: torch.Tensor) -> tuple[Any, ...]:
        """One pass for both features; the scale's gradient falls out of it."""
        row, col, a, b, scale, *rest, limit_row, limit_col = ctx.saved_tensors
        exclude_self, rows, columns, backend = ctx.flags
        needs = sum(bit for bit, asked in zip(NEEDS.values(), ctx.needs_input_grad, strict=False) if asked)
        needs += WIDE * (ctx.dtypes != (a.dtype, b.dtype))
        grad_a, grad_b, dot = operator("contrastive_backward", backend)(
            grad_row[:GRADS].contiguous(),
            grad_col[:GRADS].contiguous(),
            row,
            col,
            a,
            b,
            scale,
            None,
            *rest,
            exclude_self,
            limit_row,
            limit_col,
            rows,
            columns,
            needs,
        )
        return (
            grad_a.to(ctx.dtypes[0]) if needs & NEEDS["a"] else None,
            grad_b.to(ctx.dtypes[1]) if needs & NEEDS["b"] else None,
            dot.sum(dtype=torch.float64).to(scale.dtype) if needs & NEEDS["scale"] else None,
            *[None] * 17,
        )


class SigmoidSum(torch.autograd.Function):
    """``sum_i weight_i * loss_i`` of the sigmoid loss; its gradients are made in the forward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        a: torch.Tensor,
        b: torch.Tensor,
        scale: torch.Tensor,
        bias: torch.Tensor,
        norm_a: Optional,
        norm_b: Optional,
        id_a: torch.Tensor,
        id_b: torch.Tensor,
        skip_a: Optional,
        skip_b: Optional,
        exact: Optional,
        weight: torch.Tensor,
        exclude_self: bool,
        backend: str,
    ) -> torch.Tensor:
        """Arguments as in the schema."""
        problem = (a, b, scale, bias, norm_a, norm_b, id_a, id_b, skip_a, skip_b, exact)
        needs = SigmoidSum.needs(ctx)
        loss, *grads = operator("sigmoid", backend)(*problem, exclude_self, weight, needs)
        ctx.save_for_backward(*problem, weight)
        ctx.flags = (exclude_self, backend)
        ctx.grads = grads
        return (loss * weight).sum()

    @staticmethod
    def needs(ctx: Any) -> int:
        """The bit mask of wanted gradients."""
        wanted = ctx.needs_input_grad
        return NEEDS["a"] * wanted[0] + NEEDS["b"] * wanted[1] + NEEDS["scale"] * (wanted[2] or wanted[3])

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        """Scales what the forward pass left, in place; a second backward of a kept graph computes it anew."""
        grads, ctx.grads = ctx.grads, None
        if grads is None:
            *problem, weight = ctx.saved_tensors
            exclude_self, backend = ctx.flags
            _, *grads = operator("sigmoid", backend)(*problem, exclude_self, weight, SigmoidSum.needs(ctx))
        grad_a, grad_b, dot, row_dz = grads
        wanted, dtype = ctx.needs_input_grad, ctx.saved_tensors[0].dtype
        return (
            grad_a.mul_(grad).to(dtype) if wanted[0] else None,
            grad_b.mul_(grad).to(dtype) if wanted[1] else None,
            (dot.sum(dtype=torch.float64) * grad).float() if wanted[2] else None,
            (row_dz.sum(dtype=torch.float64) * grad).float() if wanted[3] else None,
            *[None] * 10,
        )


class SigmoidRows(torch.autograd.Function):
    """Each row's sigmoid loss; the gradients take a second pass, for their weights are not known before."""

    @staticmethod
    def forward(
        ctx: Any, a: torch.Tensor, b: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor, *rest: Any
    ) -> torch.Tensor:
        """``rest``: norms, ids, skips, exact, exclude_self, backend."""
        *tensors, exclude_self, backend = rest
        ctx.save_for_backward(a, b, scale, bias, *tensors)
        ctx.flags = (exclude_self, backend)
        result: torch.Tensor = operator("sigmoid", backend)(a, b, scale, bias, *tensors, exclude_self, None, 0)[0]
        return result

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        """The fused pass with the incoming gradients as weights."""
        exclude_self, backend = ctx.flags
        wanted, a, needs = ctx.needs_input_grad, ctx.saved_tensors[0], SigmoidSum.needs(ctx)
        _, grad_a, grad_b, dot, row_dz = operator("sigmoid", backend)(
            *ctx.saved_tensors, exclude_self, grad.contiguous(), needs
        )
        return (
            grad_a.to(a.dtype) if wanted[0] else None,
            grad_b.to(a.dtype) if wanted[1] else None,
            dot.sum(dtype=torch.float64).float() if wanted[2] else None,
            row_dz.sum(dtype=torch.float64).float() if wanted[3] else None,
            *[None] * (len(wanted) - 4),
        )


class SoftTargets(torch.autograd.Function):
    """``sum_j softmax_j(ts <ta_i, tb_j>) * s <a_i, b_j>`` per row, a block of rows at a time."""

    ROWS = 512

    @staticmethod
    def forward(
        ctx: Any, a: torch.Tensor, b: torch.Tensor, scale: torch.Tensor, ta: torch.Tensor, tb: torch.Tensor, ts: float
    ) -> torch.Tensor:
        """The targets are constants; ``a``, ``b`` and ``scale`` are differentiated."""
        mixed = torch.empty(a.shape, dtype=torch.float32, device=a.device)
        for rows, target in SoftTargets.targets(ta, tb, ts):
            torch.mm(target, b.float(), out=mixed[rows])
        dots = (a.float() * mixed).sum(1)
        ctx.save_for_backward(a, b, scale, ta, tb, mixed, dots)
        ctx.ts = ts
        return dots * scale

    @staticmethod
    def targets(ta: torch.Tensor, tb: torch.Tensor, ts: float) -> Any:
        """Blocks of rows with their soft targets."""
        wide = tb.float().T
        for first in range(0, ta.shape[0], SoftTargets.ROWS):
            rows = slice(first, first + SoftTargets.ROWS)
            yield rows, (ts * (ta[rows].float() @ wide)).softmax(1)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        """Recomputes the targets, a block at a time."""
        a, b, scale, ta, tb, mixed, dots = ctx.saved_tensors
        factor = (grad * scale)[:, None]
        grad_b = torch.zeros(b.shape, dtype=torch.float32, device=b.device)
        for rows, target in SoftTargets.targets(ta, tb, ctx.ts):
            grad_b.addmm_(target.T, factor[rows] * a[rows].float())
        return (factor * mixed).to(a.dtype), grad_b.to(b.dtype), (grad * dots).sum(), None, None, None
