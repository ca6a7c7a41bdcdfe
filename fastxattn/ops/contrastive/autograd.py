"""The gradients of the fused operators: the one place that saves tensors.

Each Function is also a composite operator (:func:`fastxattn.runtime.operators.composite`), which traced programs call.
Arguments called *problem* are those of the schema, ``a`` to ``exclude_self``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastxattn.ops.contrastive.schema import GRADS, LIMITS, NEEDS, PROBLEM, WIDE
from fastxattn.runtime.operators import KernelFunction, composite, first_order, run, transforming

_PROBLEM_LENGTH = PROBLEM.count(",") + 1


def operator(name: str, backend: str) -> Any:
    """``torch.ops.fastxattn.<name>_<backend>``."""
    return getattr(torch.ops.fastxattn, f"{name}_{backend}").default


class PairStats(KernelFunction):
    """Row and column statistics (:data:`fastxattn.ops.contrastive.schema.STATS`) of the similarity matrix.

    Arguments: backend, wide_a, wide_b, *problem, limit_row, limit_col, rank_row, rank_col, rows, columns, means.
    Kernels read the problem's features; gradients belong to ``wide_a`` and ``wide_b``, which hold the same numbers: the
    features themselves, or float32 copies where several parts of a loss add gradients up, which would else be rounded.
    """

    @staticmethod
    def forward(backend: str, wide_a: Tensor, wide_b: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
        """Run the backend's operator; ``rows`` and ``columns`` select the directions."""
        row, col = run(operator("contrastive_stats", backend), *arguments)
        return row, col

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        """Save the problem, its limits and the statistics."""
        ctx.backend, wide_a, wide_b, *arguments = inputs
        *tensors, exclude_self = arguments[:_PROBLEM_LENGTH]
        limit_row, limit_col, _, _, rows, columns, _ = arguments[_PROBLEM_LENGTH:]
        ctx.flags = (exclude_self, rows, columns)
        ctx.wide = wide_a.dtype != tensors[0].dtype or wide_b.dtype != tensors[1].dtype
        ctx.dtypes = wide_a.dtype, wide_b.dtype
        ctx.save_for_backward(*output, *tensors, limit_row, limit_col)

    @staticmethod
    @first_order("infonce_loss")
    def backward(ctx: Any, saved: tuple[Any, ...], grad_row: Tensor, grad_col: Tensor) -> tuple[Any, ...]:
        """One pass for both features; the scale's gradient falls out of it."""
        row, col, *problem, limit_row, limit_col = saved
        exclude_self, rows, columns = ctx.flags
        _, wanted_a, wanted_b, _, _, wanted_scale, *rest = ctx.needs_input_grad
        wanted = dict(zip(NEEDS, (wanted_a, wanted_b, wanted_scale), strict=True))
        needs = sum(bit for name, bit in NEEDS.items() if wanted[name]) + WIDE * ctx.wide
        grad_a, grad_b, dot = operator("contrastive_backward", ctx.backend)(
            grad_row[:GRADS].contiguous(), grad_col[:GRADS].contiguous(), row, col, *problem, exclude_self, limit_row,
            limit_col, rows, columns, needs,
        )  # fmt: skip
        return (
            None,
            grad_a.to(ctx.dtypes[0]) if wanted_a else None,
            grad_b.to(ctx.dtypes[1]) if wanted_b else None,
            None,
            None,
            dot.sum(dtype=torch.float64).to(problem[2].dtype) if wanted_scale else None,
            *[None] * len(rest),
        )


class SigmoidSum(KernelFunction):
    """``sum_i weight_i * loss_i`` of the sigmoid loss; the features' gradients are made in the forward pass.

    Arguments: backend, needs, *problem, weight. Returns the sum, and without gradient the rows' losses and the
    operator's other results for ``needs``.
    """

    @staticmethod
    def forward(backend: str, needs: int, *arguments: Any) -> tuple[Tensor, ...]:
        """One pass for loss and gradients."""
        weight = arguments[-1]
        loss, *grads = run(operator("sigmoid", backend), *arguments, needs)
        return (loss * weight).sum(), loss, *grads

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Save the problem and the rows' losses; the gradients wait on the context, to be scaled in place."""
        ctx.backend, _, *arguments = inputs
        *tensors, ctx.exclude_self, weight = arguments
        ctx.mark_non_differentiable(*output[1:])
        ctx.grads = output[2:]
        ctx.save_for_backward(*tensors, weight, output[1])

    @staticmethod
    @first_order("sigmoid_loss")
    def backward(ctx: Any, saved: tuple[Any, ...], grad: Tensor, *_: None) -> tuple[Any, ...]:
        """Scale what the forward pass left; a second backward of a kept graph computes it anew."""
        *problem, weight, loss = saved
        _, _, *wanted = ctx.needs_input_grad
        grads, ctx.grads = ctx.grads, None
        if grads is None:
            needs = needs_of(wanted)
            _, *grads = operator("sigmoid", ctx.backend)(*problem, ctx.exclude_self, weight, needs)
        grad_a, grad_b, dot, row_dz = grads
        if transforming() or torch._C._functorch.is_legacy_batchedtensor(grad):
            grad_a, grad_b = grad_a * grad, grad_b * grad
        else:
            grad_a, grad_b = (g.mul_(grad) if g.numel() else g for g in (grad_a, grad_b))
        return None, None, *_by_argument(wanted, problem, grad_a, grad_b, dot, row_dz, grad), loss * grad


class SigmoidRows(KernelFunction):
    """Each row's sigmoid loss; the gradients take a second pass, for their weights are not known before.

    Arguments: backend, *problem.
    """

    @staticmethod
    def forward(backend: str, *problem: Any) -> Tensor:
        """The losses alone."""
        result: Tensor = run(operator("sigmoid", backend), *problem, None, 0)[0]
        return result

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Save the problem."""
        ctx.backend, *tensors, ctx.exclude_self = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    @first_order("sigmoid_loss")
    def backward(ctx: Any, saved: tuple[Any, ...], grad: Tensor) -> tuple[Any, ...]:
        """The fused pass with the incoming gradients as weights."""
        _, *wanted = ctx.needs_input_grad
        _, *grads = operator("sigmoid", ctx.backend)(*saved, ctx.exclude_self, grad.contiguous(), needs_of(wanted))
        grad_a, grad_b, dot, row_dz = grads
        one = torch.ones((), dtype=torch.float32, device=grad.device)
        return None, *_by_argument(wanted, saved, grad_a, grad_b, dot, row_dz, one)


def needs_of(wanted: list[bool]) -> int:
    """The operator's bit mask from whether a, b, scale and bias want a gradient."""
    return NEEDS["a"] * wanted[0] + NEEDS["b"] * wanted[1] + NEEDS["scale"] * (wanted[2] or wanted[3])


def _by_argument(
    wanted: list[bool],
    problem: tuple[Any, ...] | list[Any],
    grad_a: Tensor,
    grad_b: Tensor,
    dot: Tensor,
    row_dz: Tensor,
    factor: Tensor,
) -> tuple[Any, ...]:
    """Gradients in the order of the problem; those of scale and bias are sums over rows times ``factor``."""
    a, b, scale, bias = problem[:4]
    return (
        grad_a.to(a.dtype) if wanted[0] else None,
        grad_b.to(b.dtype) if wanted[1] else None,
        (dot.sum(dtype=torch.float64) * factor).to(scale.dtype) if wanted[2] else None,
        (row_dz.sum(dtype=torch.float64) * factor).to(bias.dtype) if wanted[3] else None,
        *[None] * (_PROBLEM_LENGTH - 4),
    )


class SoftTargets(KernelFunction):
    """``sum_j softmax_j(<ta_i, tb_j>) * s <a_i, b_j>`` per row, a block of rows at a time.

    Arguments: a, b, scale, ta, tb; the targets are constants. Returns the rows, and without gradient the mixed
    features (N, D) and the rows before scaling.
    """

    ROWS = 512

    @staticmethod
    def forward(a: Tensor, b: Tensor, scale: Tensor, ta: Tensor, tb: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The targets of a block are forgotten with it."""
        wide = b.float()
        mixed = torch.cat([a.new_empty((0, b.shape[1]), dtype=torch.float32)] + [
            target @ wide for target in SoftTargets.targets(ta, tb)
        ])  # fmt: skip
        dots = (a.float() * mixed).sum(1)
        return dots * scale, mixed, dots

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Save features and results."""
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(*inputs, *output[1:])

    @staticmethod
    def targets(ta: Tensor, tb: Tensor) -> Any:
        """Soft targets of blocks of rows; split, because a loop over a number fixes it in an exported program."""
        wide = tb.float().T
        for rows in ta.split(SoftTargets.ROWS):
            yield (rows.float() @ wide).softmax(1)

    @staticmethod
    @first_order("infonce_loss with a teacher")
    def backward(ctx: Any, saved: tuple[Any, ...], grad: Tensor, *_: None) -> tuple[Any, ...]:
        """Recompute the targets, a block at a time."""
        a, b, scale, ta, tb, mixed, dots = saved
        factor = (grad * scale)[:, None]
        grad_b = torch.zeros(b.shape, dtype=torch.float32, device=b.device)
        blocks = SoftTargets.targets(ta, tb), factor.split(SoftTargets.ROWS), a.split(SoftTargets.ROWS)
        for target, weight, rows in zip(*blocks, strict=True):
            grad_b = grad_b.addmm(target.T, weight * rows.float())
        return (factor * mixed).to(a.dtype), grad_b.to(b.dtype), (grad * dots).sum(), None, None


_COMPOSITES = {
    "pair_stats": (
        PairStats,
        f"(str backend, Tensor wide_a, Tensor wide_b, {PROBLEM}, {LIMITS}, Tensor? rank_row, Tensor? rank_col, "
        "bool rows, bool columns, bool means) -> (Tensor, Tensor)",
    ),
    "sigmoid_sum": (
        SigmoidSum,
        f"(str backend, int needs, {PROBLEM}, Tensor weight) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    ),
    "sigmoid_rows": (SigmoidRows, f"(str backend, {PROBLEM}) -> Tensor"),
    "soft_targets": (
        SoftTargets,
        "(Tensor a, Tensor b, Tensor scale, Tensor ta, Tensor tb) -> (Tensor, Tensor, Tensor)",
    ),
}
for _name, (_function, _signature) in _COMPOSITES.items():
    composite(_name, _signature, _function.apply)


def apply(name: str, *arguments: Any) -> Any:
    """The Function called ``name``; a traced program calls its composite operator."""
    if torch.compiler.is_compiling():
        return getattr(torch.ops.fastxattn, name)(*arguments)
    return _COMPOSITES[name][0].apply(*arguments)
