"""The public contrastive losses: checks, then dispatch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from fastxattn.ops.contrastive import checks, cpu, cuda, fused, reference, triton
from fastxattn.ops.contrastive.problem import Problem
from fastxattn.ops.numbers import SHARE, check_number
from fastxattn.runtime import backend as choose
from fastxattn.runtime.autocast import cast, no_autocast
from fastxattn.runtime.backend import Backend, Explanation, preferring

BACKENDS = (
    Backend("cpu", cpu.supports),
    Backend("triton", triton.supports),
    Backend("cuda", cuda.supports),
    Backend("reference", lambda problem: None),
)
"""In the order in which ``auto`` tries them, see :func:`_in_order`."""
REDUCTIONS = ("mean", "sum", "none")
Ids = torch.Tensor | tuple[torch.Tensor, torch.Tensor]


def infonce_loss(
    a: torch.Tensor,
    b: torch.Tensor,
    logit_scale: float | torch.Tensor,
    *,
    targets: torch.Tensor | None = None,
    groups: Ids | None = None,
    hard_negatives: torch.Tensor | None = None,
    queue_a: torch.Tensor | None = None,
    queue_b: torch.Tensor | None = None,
    teacher: tuple[torch.Tensor, torch.Tensor, float | torch.Tensor] | None = None,
    ignore_ids: Ids | None = None,
    false_negative_margin: float | None = None,
    exclude_self: bool = False,
    weights: torch.Tensor | Sequence[torch.Tensor] | None = None,
    label_smoothing: float = 0.0,
    decoupled: bool = False,
    symmetric: bool = True,
    normalize: bool = False,
    reduction: str = "mean",
    return_metrics: bool = False,
    backend: str = "auto",
) -> Any:
    r"""InfoNCE (CLIP's loss) without the N x M logits in memory, forward or backward.

    With logits ``z = logit_scale * a @ b.T`` row ``i`` costs ``logsumexp_j z_ij - mean_{j in P_i} z_ij``, where
    ``P_i`` are its positives; a column costs the same along the rows, and the symmetric loss is the mean of both
    directions. A row without a positive costs nothing and does not count in the mean. (van den Oord et al. 2018;
    Radford et al. 2021; several positives as in Khosla et al. 2020, "L_out"; decoupled as in Yeh et al. 2022.)

    Args:
        a: (N, D) float32, bfloat16, float16 (float64 on the reference backend); also accepted as ``b`` itself. Under
            autocast all features take its dtype, but for float64 ones
            (:func:`fastxattn.runtime.autocast.cast`).
        b: (M, D), the dtype of ``a``.
        logit_scale: a finite number of Python or NumPy, or a tensor of one element of any shape and dtype, which then
            gets a gradient in its dtype. Used in float32 (float64 for float64 features).
        targets: (N,) the positive column of each row, -1 for none; default: column i for row i.
        groups: integer ids, one (N,) for both sides or a pair (N,), (M,): equal ids >= 0 are positives.
        hard_negatives: (N, K, D) further negatives of each row, in the direction a to b.
        queue_a: (Q, D) further negatives for the rows of ``b``, as in MoCo; needs ``symmetric``.
        queue_b: (Q, D) further negatives for the rows of ``a``.
        teacher: (features_a, features_b, scale): soft targets, the softmax of the teacher's own logits. The scale is as
            ``logit_scale``; nothing of a teacher gets a gradient.
        ignore_ids: integer ids as for ``groups``: a negative with equal ids >= 0 is a false one and is left out.
        false_negative_margin: leaves out negatives whose similarity exceeds the positive's by more than this.
        exclude_self: leaves out pairs (i, i), for ``a is b``; they are no positives, whatever ``targets`` say.
        weights: (N,) for both directions, or a pair (N,), (M,), floating point: the mean becomes the weighted mean.
            They get a gradient and may be negative; NaN and infinity are refused where values can be read.
        label_smoothing: this share of the target is spread over all candidates.
        decoupled: positives are left out of the log-sum-exp.
        symmetric: both directions; else only a to b.
        normalize: unit-length features inside the same pass; a zero vector stays zero with zero gradient.
        reduction: ``mean``, ``sum`` (half of both directions' sum when symmetric), or ``none``: the rows' losses (N,),
            and when symmetric a pair with the columns' (M,).
        return_metrics: also return one :class:`Metrics` per direction, from the same pass.
        backend: ``auto``, ``cpu``, ``triton``, ``cuda`` or ``reference``.

    Returns:
        The loss in float32 (float64 for float64); with ``return_metrics`` a pair (loss, [metrics, ...]).

    Raises:
        TypeError, ValueError: an argument breaks a rule above, or two options exclude each other.
        RuntimeError: the backend asked for cannot run this problem.

    Example:
        >>> loss = fastxattn.infonce_loss(image_features, text_features, model.logit_scale.exp())
    """
    problem = _problem(a, b, logit_scale, targets, groups, ignore_ids, exclude_self, normalize)
    n, m = problem.a.shape[0], problem.b.shape[0]
    checks.choice("reduction", reduction, REDUCTIONS)
    label_smoothing = check_number("label_smoothing", label_smoothing, *SHARE)
    if false_negative_margin is not None:
        false_negative_margin = check_number("false_negative_margin", false_negative_margin)
    if queue_a is not None and not symmetric:
        raise ValueError("queue_a must be None when symmetric=False: only columns see it")
    if (return_metrics or false_negative_margin is not None) and groups is not None:
        raise ValueError("groups must be None with return_metrics or false_negative_margin")
    if decoupled and label_smoothing > 0:
        raise ValueError(f"label_smoothing must be 0 when decoupled=True; got {label_smoothing}")
    problem.symmetric, problem.decoupled, problem.metrics = symmetric, decoupled, return_metrics
    problem.label_smoothing, problem.margin = label_smoothing, false_negative_margin
    if queue_a is not None:
        problem.queue_a = checks.features("queue_a", cast(queue_a), problem.a)
    if queue_b is not None:
        problem.queue_b = checks.features("queue_b", cast(queue_b), problem.a)
    if hard_negatives is not None:
        problem.hard_negatives = checks.hard_negatives(cast(hard_negatives), problem.a)
    if teacher is not None:
        _check_teacher(problem, teacher)
    weight = checks.row_weights(weights, (n, m) if symmetric else (n,), problem.a)
    name = choose.resolve("infonce_loss", _in_order(problem), problem, backend)
    with no_autocast(problem.a.device):
        losses, metrics = (
            reference.infonce_reference(problem) if name == "reference" else fused.infonce_fused(problem, name)
        )
        result = _reduce(losses, weight, reduction)
    return (result, metrics) if return_metrics else result


def sigmoid_loss(
    a: torch.Tensor,
    b: torch.Tensor,
    logit_scale: float | torch.Tensor,
    logit_bias: float | torch.Tensor | None = 0.0,
    *,
    targets: torch.Tensor | None = None,
    groups: Ids | None = None,
    ignore_ids: Ids | None = None,
    exclude_self: bool = False,
    weights: torch.Tensor | None = None,
    normalize: bool = False,
    reduction: str = "mean",
    backend: str = "auto",
) -> torch.Tensor:
    r"""The pairwise sigmoid loss (SigLIP, Zhai et al. 2023) without the N x M logits in memory.

    Every pair is a question of its own: ``sum_j -log sigmoid(y_ij (logit_scale <a_i, b_j> + logit_bias))`` per row,
    with ``y`` 1 for positives and -1 for all others. ``mean`` divides the sum over all pairs by N, as SigLIP does.

    Args:
        a: (N, D) float32, bfloat16, float16 (float64 on the reference backend).
        b: (M, D), the dtype of ``a``.
        logit_scale: see :func:`infonce_loss`.
        logit_bias: a number or a tensor as ``logit_scale``; None is 0.
        targets: see :func:`infonce_loss`; so are ``groups``, ``ignore_ids``, ``exclude_self`` and ``normalize``.
        groups: integer ids; equal ids >= 0 are positives.
        ignore_ids: integer ids; negatives with equal ids are left out.
        exclude_self: leaves out pairs (i, i).
        weights: (N,) weights of the rows, as in :func:`infonce_loss`; the mean becomes the weighted mean.
        normalize: unit-length features inside the same pass.
        reduction: ``mean``, ``sum`` or ``none`` (N,).
        backend: ``auto``, ``cpu``, ``triton``, ``cuda`` or ``reference``.

    Returns:
        The loss in float32 (float64 for float64).

    Raises:
        TypeError, ValueError: an argument breaks a rule above.
        RuntimeError: the backend asked for cannot run this problem.
    """
    problem = _problem(a, b, logit_scale, targets, groups, ignore_ids, exclude_self, normalize)
    problem.bias = checks.one_element(
        "logit_bias", 0.0 if logit_bias is None else logit_bias, problem.a.device, problem.scale.dtype
    )
    checks.choice("reduction", reduction, REDUCTIONS)
    n = problem.a.shape[0]
    (weight,) = checks.row_weights(weights, (n,), problem.a)
    name = choose.resolve("sigmoid_loss", _in_order(problem), problem, backend)
    with no_autocast(problem.a.device):
        if name == "reference":
            rows = reference.sigmoid_reference(problem)
            result: torch.Tensor = _reduce([(rows, torch.ones_like(rows, dtype=torch.bool))], [weight], reduction)
            return result
        if reduction == "none":
            rows = fused.sigmoid_fused(problem, None, name)
            return rows if weight is None else rows * weight
        row_weight = torch.ones(n, dtype=torch.float32, device=problem.a.device) if weight is None else weight
        if reduction == "mean":
            total = row_weight.sum()
            row_weight = row_weight / torch.where(total == 0, 1.0, total)
        return fused.sigmoid_fused(problem, row_weight.contiguous(), name)


def explain(
    a: torch.Tensor, b: torch.Tensor, logit_scale: float | torch.Tensor = 1.0, backend: str = "auto"
) -> Explanation:
    """Every backend's verdict on a contrastive loss of these features, and the one that would run."""
    problem = _problem(a, b, logit_scale, None, None, None, False, False)
    return choose.explain("contrastive", _in_order(problem), problem, backend)


def _in_order(problem: Problem) -> tuple[Backend, ...]:
    """In float32 the CUDA kernels were measured to be 3.7 to 4.6 times as fast as Triton's, in 16 bits slower."""
    return preferring(BACKENDS, "cuda" if problem.a.is_cuda and problem.a.dtype == torch.float32 else None)


def _problem(
    a: torch.Tensor,
    b: torch.Tensor,
    scale: float | torch.Tensor,
    targets: torch.Tensor | None,
    groups: Ids | None,
    ignore_ids: Ids | None,
    exclude_self: bool,
    normalize: bool,
) -> Problem:
    same = a is b
    a = checks.features("a", cast(a))
    b = a if same else checks.features("b", cast(b), a)
    if a.shape[1] == 0:
        raise ValueError("a must have at least 1 feature; got 0")
    n, m = a.shape[0], b.shape[0]
    problem = Problem(a, b, checks.one_element("logit_scale", scale, a.device, checks.computed_in(a.dtype)))
    problem.exclude_self, problem.normalize = exclude_self, normalize
    if targets is not None:
        if groups is not None:
            raise ValueError("targets must be None when groups are given: both say which pairs are positive")
        problem.targets = checks.integers("targets", targets, n, a.device)
        checks.targets_in_range(problem.targets, m)
    if groups is not None:
        problem.groups = checks.both_sides("groups", groups, n, m, a.device)
    if ignore_ids is not None:
        problem.ignore_ids = checks.both_sides("ignore_ids", ignore_ids, n, m, a.device)
    return problem


def _check_teacher(p: Problem, teacher: tuple[torch.Tensor, torch.Tensor, float | torch.Tensor]) -> None:
    others = (p.targets, p.groups, p.hard_negatives, p.queue_a, p.queue_b, p.ignore_ids, p.margin)
    if any(x is not None for x in others) or p.label_smoothing or p.decoupled or p.metrics or p.exclude_self:
        raise ValueError("teacher must come without targets, groups, negatives, masks, smoothing, decoupled or metrics")
    if not isinstance(teacher, (tuple, list)) or len(teacher) != 3:
        got = f"{len(teacher)} entries" if isinstance(teacher, (tuple, list)) else type(teacher).__name__
        raise ValueError(f"teacher must be (features_a, features_b, scale); got {got}")
    teacher_a = checks.features("teacher[0]", cast(teacher[0]))
    checks.same_device("teacher[0]", teacher_a, p.a.device)
    teacher_b = checks.features("teacher[1]", cast(teacher[1]), teacher_a)
    if (teacher_a.shape[0], teacher_b.shape[0]) != (p.a.shape[0], p.b.shape[0]):
        raise ValueError(
            f"teacher must have {p.a.shape[0]} and {p.b.shape[0]} rows; "
            f"got {teacher_a.shape[0]} and {teacher_b.shape[0]}"
        )
    scale = checks.one_element("teacher[2]", teacher[2], p.a.device, p.scale.dtype)
    # In the loss's dtype and with the scale in one side: backends then take features alone.
    p.teacher = (scale * teacher_a.to(scale.dtype)).detach(), teacher_b.to(scale.dtype).detach()


def _reduce(
    losses: list[tuple[torch.Tensor, torch.Tensor]], weights: Sequence[torch.Tensor | None], reduction: str
) -> Any:
    results = []
    for (loss, has), weight in zip(losses, weights, strict=True):
        if weight is not None:
            loss = torch.where(has, loss * weight, 0.0)
        if reduction == "none":
            results.append(loss)
            continue
        total = loss.sum()
        if reduction == "mean":
            number = (has.to(loss.dtype) if weight is None else torch.where(has, weight, 0.0)).sum()
            total = total / torch.where(number == 0, 1.0, number)
        results.append(total)
    if reduction == "none":
        return results[0] if len(results) == 1 else tuple(results)
    return results[0] if len(results) == 1 else (results[0] + results[1]) / 2
