"""Operators of the contrastive losses and their derivatives, the one place that saves tensors.

``contrastive_stats`` returns (7, N) and (7, M) float32: :data:`STATS`. The first four carry a gradient, which
``contrastive_backward`` takes as (4, N) and (4, M); it returns gradients of a and b and, per row, the sum of
dz * logit / scale; gradients are in the features' dtype, or with the bit :data:`WIDE` in ``needs`` in float32.
``sigmoid`` returns per-row sums of its terms and, with ``needs``, the gradients of their sum weighted by ``weight`` in
the same pass, in float32. Results not in ``needs`` have no rows.

Each Function is also a composite operator (:func:`fastxattn.runtime.operators.composite`), which traced programs call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastxattn.ops.contrastive.problem import Pairs, Sigmoid, Slopes, Statistics
from fastxattn.runtime.operators import KernelFunction, composite, define, first_order, run, transforming

STATS = ("lse_neg", "mean_neg", "mean_pos", "excess_pos", "num_neg", "num_pos", "ahead")
GRADS = 4
NEEDS = Pairs.bits
WIDE = NEEDS["bias"]
"""Where there is no bias, its bit asks for gradients in float32."""


def _positive_fake(a: Tensor, *_: object) -> Tensor:
    return a.new_empty((a.shape[0],), dtype=torch.float32)


def _stats_fake(a: Tensor, b: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    row, col = (x.new_empty((len(STATS), x.shape[0]), dtype=torch.float32) for x in (a, b))
    return row, col


def _feature_grads(a: Tensor, b: Tensor, needs: int, wide: bool) -> list[Tensor]:
    return [
        x.new_empty(x.shape, dtype=torch.float32 if wide else a.dtype)
        if needs & NEEDS[name]
        else x.new_empty((0,), dtype=torch.float32)
        for name, x in (("a", a), ("b", b))
    ]


def _backward_fake(*arguments: Any) -> tuple[Tensor, ...]:
    a, b, needs = arguments[4], arguments[5], arguments[-1]
    return *_feature_grads(a, b, needs, bool(needs & WIDE)), a.new_empty((a.shape[0],), dtype=torch.float32)


def _sigmoid_fake(a: Tensor, b: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    needs = arguments[-1]
    loss, *rows = (a.new_empty((n,), dtype=torch.float32) for n in (a.shape[0], *[a.shape[0] if needs else 0] * 2))
    return loss, *_feature_grads(a, b, needs, True), *rows


OPERATORS: dict[str, tuple[str, Callable[..., Any]]] = {
    "positive_logits": (f"({Pairs.schema()}, bool blocked) -> Tensor", _positive_fake),
    "contrastive_stats": (f"({Statistics.schema()}) -> (Tensor row_stats, Tensor col_stats)", _stats_fake),
    "contrastive_backward": (
        f"(Tensor grad_row, Tensor grad_col, Tensor row_stats, Tensor col_stats, {Slopes.schema()}, int needs) -> "
        "(Tensor grad_a, Tensor grad_b, Tensor dot)",
        _backward_fake,
    ),
    "sigmoid": (
        f"({Sigmoid.schema()}, int needs) -> (Tensor loss, Tensor grad_a, Tensor grad_b, Tensor dot, Tensor row_dz)",
        _sigmoid_fake,
    ),
}
for _backend in ("cpu", "triton", "cuda"):
    for _name, (_signature, _fake) in OPERATORS.items():
        define(f"{_name}_{_backend}", _signature, _fake)


def operator(name: str, backend: str) -> Any:
    """``torch.ops.fastxattn.<name>_<backend>``."""
    return getattr(torch.ops.fastxattn, f"{name}_{backend}").default


def _gradients(
    p: Pairs, needs: int, features: tuple[Tensor, Tensor], dot: Tensor, row_dz: Tensor, factor: float | Tensor
) -> tuple[Tensor | None, ...]:
    """One per field of the problem, in its dtype; those of scale and bias are sums over rows times ``factor``."""
    grads = dict(zip(NEEDS, (*features, dot, row_dz), strict=True))
    for name, tensor in zip(NEEDS, p.differentiated(), strict=True):
        if tensor is not None and needs & NEEDS[name]:
            total = grads[name].sum(dtype=torch.float64) * factor if name in ("scale", "bias") else grads[name]
            grads[name] = total.to(tensor.dtype)
    return p.routed(list(grads.values()), needs)


class PairStats(KernelFunction):
    """Row and column statistics (:data:`STATS`) of the similarity matrix.

    Arguments: backend, wide_a, wide_b, *:class:`Statistics`. Kernels read the problem's features; gradients belong to
    ``wide_a`` and ``wide_b``, which hold the same numbers: the features themselves, or float32 copies where several
    parts of a loss add gradients up, which would else be rounded.
    """

    @staticmethod
    def forward(backend: str, wide_a: Tensor, wide_b: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
        """Run the backend's operator; ``rows`` and ``columns`` select the directions."""
        row, col = run(operator("contrastive_stats", backend), *arguments)
        return row, col

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        """Save the problem and the statistics."""
        ctx.backend, wide_a, wide_b, *arguments = inputs
        p = Statistics.of(arguments)
        ctx.wide = wide_a.dtype != p.a.dtype or wide_b.dtype != p.b.dtype
        ctx.dtypes = wide_a.dtype, wide_b.dtype
        p.save(ctx, *output)

    @staticmethod
    @first_order("infonce_loss")
    def backward(ctx: Any, saved: tuple[Any, ...], grad_row: Tensor, grad_col: Tensor) -> tuple[Any, ...]:
        """One pass for both features; the scale's gradient falls out of it."""
        p, stats = Statistics.restore(ctx, saved)
        _, *wide, _, _, scale = ctx.needs_input_grad[:6]
        needs = Pairs.needs([*wide, scale, *[False] * (len(Pairs.names) - 3)])
        slopes = Slopes.of([getattr(p, name) for name in Slopes.names])
        *features, dot = operator("contrastive_backward", ctx.backend)(
            *(g[:GRADS].contiguous() for g in (grad_row, grad_col)), *stats, *slopes.values(), needs + WIDE * ctx.wide
        )
        grads = [g.to(dtype) if asked else None for g, dtype, asked in zip(features, ctx.dtypes, wide, strict=True)]
        of_scale = dot.sum(dtype=torch.float64).to(p.scale.dtype) if scale else None
        return None, *grads, None, None, of_scale, *[None] * (len(p.names) - 3)


class SigmoidSum(KernelFunction):
    """``sum_i weight_i * loss_i`` of the sigmoid loss; the features' gradients are made in the forward pass.

    Arguments: backend, needs, *:class:`Sigmoid`. Returns the sum, and without gradient the rows' losses and the
    operator's other results for ``needs``.
    """

    @staticmethod
    def forward(backend: str, needs: int, *arguments: Any) -> tuple[Tensor, ...]:
        """One pass for loss and gradients."""
        loss, *grads = run(operator("sigmoid", backend), *arguments, needs)
        return (loss * arguments[-1]).sum(), loss, *grads

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Save the problem and the rows' losses; the gradients wait on the context, to be scaled in place."""
        ctx.backend, _, *arguments = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.grads = output[2:]
        Sigmoid.of(arguments).save(ctx, output[1])

    @staticmethod
    @first_order("sigmoid_loss")
    def backward(ctx: Any, saved: tuple[Any, ...], grad: Tensor, *_: None) -> tuple[Any, ...]:
        """Scale what the forward pass left; a second backward of a kept graph computes it anew."""
        p, (loss,) = Sigmoid.restore(ctx, saved)
        needs = p.needs(ctx.needs_input_grad[2:])
        grads, ctx.grads = ctx.grads, None
        if grads is None:
            _, *grads = operator("sigmoid", ctx.backend)(*p.values(), needs)
        grad_a, grad_b, dot, row_dz = grads
        if transforming() or torch._C._functorch.is_legacy_batchedtensor(grad):
            features = grad_a * grad, grad_b * grad
        else:
            features = tuple(g.mul_(grad) if g.numel() else g for g in (grad_a, grad_b))
        return None, None, *_gradients(p, needs, features, dot, row_dz, grad)[:-1], loss * grad


class SigmoidRows(KernelFunction):
    """Each row's sigmoid loss; the gradients take a second pass, for their weights are not known before.

    Arguments: backend, *:class:`Pairs`.
    """

    @staticmethod
    def forward(backend: str, *arguments: Any) -> Tensor:
        """The losses alone."""
        result: Tensor = run(operator("sigmoid", backend), *arguments, None, 0)[0]
        return result

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Save the problem."""
        ctx.backend, *arguments = inputs
        Pairs.of(arguments).save(ctx)

    @staticmethod
    @first_order("sigmoid_loss")
    def backward(ctx: Any, saved: tuple[Any, ...], grad: Tensor) -> tuple[Any, ...]:
        """The fused pass with the incoming gradients as weights."""
        p, _ = Pairs.restore(ctx, saved)
        needs = p.needs(ctx.needs_input_grad[1:])
        weighted = p.into(Sigmoid, weight=grad.contiguous())
        _, grad_a, grad_b, dot, row_dz = operator("sigmoid", ctx.backend)(*weighted.values(), needs)
        return None, *_gradients(p, needs, (grad_a, grad_b), dot, row_dz, 1.0)


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
        none = a.new_empty((0, b.shape[1]), dtype=torch.float32)
        mixed = torch.cat([none, *(target @ wide for target in SoftTargets.targets(ta, tb))])
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
    @first_order("distillation_loss")
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
        f"(str backend, Tensor wide_a, Tensor wide_b, {Statistics.schema()}) -> (Tensor, Tensor)",
    ),
    "sigmoid_sum": (
        SigmoidSum,
        f"(str backend, int needs, {Sigmoid.schema()}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    ),
    "sigmoid_rows": (SigmoidRows, f"(str backend, {Pairs.schema()}) -> Tensor"),
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
