"""Public contrastive losses: validation, then dispatch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, overload

from torch import Tensor
from typing_extensions import TypedDict, Unpack

from fastxattn.ops.checks import SHARE, check_number
from fastxattn.ops.contrastive import backends, checks
from fastxattn.ops.contrastive.backends import Loss
from fastxattn.ops.contrastive.problem import Metrics, Problem
from fastxattn.runtime.autocast import cast

REDUCTIONS = ("mean", "sum", "none")
Ids = Tensor | tuple[Tensor, Tensor]
Weights = Tensor | Sequence[Tensor] | None


class DistillationOptions(TypedDict, total=False):
    """Options that every InfoNCE loss takes."""

    weights: Weights
    symmetric: bool
    normalize: bool
    backend: str


class MultiPositiveOptions(DistillationOptions, total=False):
    """Further options of :func:`multi_positive_infonce_loss`."""

    hard_negatives: Tensor | None
    image_queue: Tensor | None
    text_queue: Tensor | None
    ignore_ids: Ids | None
    exclude_self: bool
    label_smoothing: float
    decoupled: bool


class InfoNCEOptions(MultiPositiveOptions, total=False):
    """Further options of :func:`infonce_loss`."""

    targets: Tensor | None
    false_negative_margin: float | None


@overload
def infonce_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: float | Tensor = 1 / 0.07,
    *,
    reduction: Literal["mean", "sum"] = "mean",
    return_metrics: Literal[False] = False,
    **options: Unpack[InfoNCEOptions],
) -> Tensor: ...
@overload
def infonce_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: float | Tensor = 1 / 0.07,
    *,
    reduction: str,
    return_metrics: Literal[False] = False,
    **options: Unpack[InfoNCEOptions],
) -> Loss: ...
@overload
def infonce_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: float | Tensor = 1 / 0.07,
    *,
    reduction: str = "mean",
    return_metrics: Literal[True],
    **options: Unpack[InfoNCEOptions],
) -> tuple[Loss, list[Metrics]]: ...
def infonce_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: float | Tensor = 1 / 0.07,
    *,
    targets: Tensor | None = None,
    hard_negatives: Tensor | None = None,
    image_queue: Tensor | None = None,
    text_queue: Tensor | None = None,
    ignore_ids: Ids | None = None,
    false_negative_margin: float | None = None,
    exclude_self: bool = False,
    weights: Weights = None,
    label_smoothing: float = 0.0,
    decoupled: bool = False,
    symmetric: bool = True,
    normalize: bool = False,
    reduction: str = "mean",
    return_metrics: bool = False,
    backend: str = "auto",
) -> Loss | tuple[Loss, list[Metrics]]:
    r"""Compute InfoNCE (CLIP's loss) without the N x M logits in memory, forward or backward.

    With logits ``z = logit_scale * image_features @ text_features.T`` row ``i`` costs ``logsumexp_j z_ij - z_ip``,
    where ``p`` is its positive; a column costs the same along the rows, and the symmetric loss is the mean of both
    directions. A column may have several positives: it costs the mean of theirs. A row without a positive costs nothing
    and does not count in the mean. (van den Oord et al. 2018; Radford et al. 2021; decoupled as in Yeh et al. 2022.)

    Args:
        image_features: (N, D) float32, bfloat16, float16 (float64 on the reference backend). Under autocast all
            features take its dtype, but for float64 ones (:func:`fastxattn.runtime.autocast.cast`).
        text_features: (M, D), the dtype of ``image_features``; may be the same tensor.
        logit_scale: a finite number of Python or NumPy, or a tensor of one element of any shape and dtype, which then
            gets a gradient in its dtype. Used in float32 (float64 for float64 features). Default 1 / 0.07, where CLIP
            starts.
        targets: (N,) the positive column of each row, -1 for none; default: column i for row i.
        hard_negatives: (N, K, D) further negatives of each image, in the direction image to text.
        image_queue: (Q, D) further negatives for the texts, as in MoCo; needs ``symmetric``.
        text_queue: (Q, D) further negatives for the images.
        ignore_ids: integer ids, one (N,) for both sides or a pair (N,), (M,): a negative with equal ids >= 0 is a false
            one and is left out.
        false_negative_margin: leaves out negatives whose similarity exceeds the positive's by more than this.
        exclude_self: leaves out pairs (i, i), for one tensor on both sides; they are no positives, whatever ``targets``
            are.
        weights: (N,) for both directions, or a pair (N,), (M,), floating point: the mean becomes the weighted mean.
            They get a gradient and may be negative; NaN and infinity are refused where values can be read.
        label_smoothing: this share of the target is spread over all candidates.
        decoupled: positives are left out of the log-sum-exp.
        symmetric: both directions; else only image to text.
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
    problem = _problem(image_features, text_features, logit_scale, reduction, normalize, exclude_self)
    if false_negative_margin is not None:
        false_negative_margin = check_number("false_negative_margin", false_negative_margin)
    problem = problem.replace(
        **_ids(problem, targets, None, ignore_ids),
        **_negatives(problem, hard_negatives, image_queue, text_queue, symmetric),
        **_softened(label_smoothing, decoupled),
        **_weighted(problem, weights, symmetric),
        margin=false_negative_margin,
        metrics=return_metrics,
    )
    loss, metrics = _run("infonce_loss", problem, backend)
    return (loss, metrics) if return_metrics else loss


@overload
def multi_positive_infonce_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: float | Tensor = 1 / 0.07,
    *,
    groups: Ids,
    reduction: Literal["mean", "sum"] = "mean",
    **options: Unpack[MultiPositiveOptions],
) -> Tensor: ...
@overload
def multi_positive_infonce_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: float | Tensor = 1 / 0.07,
    *,
    groups: Ids,
    reduction: str,
    **options: Unpack[MultiPositiveOptions],
) -> Loss: ...
def multi_positive_infonce_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: float | Tensor = 1 / 0.07,
    *,
    groups: Ids,
    hard_negatives: Tensor | None = None,
    image_queue: Tensor | None = None,
    text_queue: Tensor | None = None,
    ignore_ids: Ids | None = None,
    exclude_self: bool = False,
    weights: Weights = None,
    label_smoothing: float = 0.0,
    decoupled: bool = False,
    symmetric: bool = True,
    normalize: bool = False,
    reduction: str = "mean",
    backend: str = "auto",
) -> Loss:
    r"""Compute InfoNCE with several positives per row, as in supervised contrastive learning.

    Row ``i`` costs ``logsumexp_j z_ij - mean_{j in P_i} z_ij``, where ``P_i`` are the columns of its group
    (Khosla et al. 2020, "L_out"). Arguments not described here, results and errors are those of :func:`infonce_loss`.

    Args:
        image_features: (N, D).
        text_features: (M, D); ``image_features`` itself with ``exclude_self`` for one modality.
        groups: integer ids (labels), one (N,) for both sides or a pair (N,), (M,): equal ids >= 0 are positives.
    """
    if groups is None:
        raise TypeError("groups must be a tensor or a pair of tensors; got NoneType")
    problem = _problem(image_features, text_features, logit_scale, reduction, normalize, exclude_self)
    problem = problem.replace(
        **_ids(problem, None, groups, ignore_ids),
        **_negatives(problem, hard_negatives, image_queue, text_queue, symmetric),
        **_softened(label_smoothing, decoupled),
        **_weighted(problem, weights, symmetric),
    )
    return _run("multi_positive_infonce_loss", problem, backend)[0]


@overload
def distillation_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: float | Tensor = 1 / 0.07,
    *,
    teacher_image_features: Tensor,
    teacher_text_features: Tensor,
    teacher_logit_scale: float | Tensor = 1 / 0.07,
    reduction: Literal["mean", "sum"] = "mean",
    **options: Unpack[DistillationOptions],
) -> Tensor: ...
@overload
def distillation_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: float | Tensor = 1 / 0.07,
    *,
    teacher_image_features: Tensor,
    teacher_text_features: Tensor,
    teacher_logit_scale: float | Tensor = 1 / 0.07,
    reduction: str,
    **options: Unpack[DistillationOptions],
) -> Loss: ...
def distillation_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: float | Tensor = 1 / 0.07,
    *,
    teacher_image_features: Tensor,
    teacher_text_features: Tensor,
    teacher_logit_scale: float | Tensor = 1 / 0.07,
    weights: Weights = None,
    symmetric: bool = True,
    normalize: bool = False,
    reduction: str = "mean",
    backend: str = "auto",
) -> Loss:
    r"""Compute the cross-entropy of a student's similarities with a teacher's, without either matrix in memory.

    Row ``i`` costs ``-sum_j softmax_j(t_ij) log_softmax_j(z_ij)`` with the student's logits ``z`` and the teacher's
    ``t``, as in open_clip's ``DistillClipLoss``. Arguments not described here and errors are those of
    :func:`infonce_loss`; nothing of the teacher gets a gradient.

    Args:
        image_features: (N, D), the student's.
        text_features: (M, D).
        logit_scale: the student's, a number or a tensor of one element; default 1 / 0.07.
        teacher_image_features: (N, E) floating point, of any width and dtype.
        teacher_text_features: (M, E), the dtype of ``teacher_image_features``.
        teacher_logit_scale: as ``logit_scale``.
        normalize: unit-length features of the student.

    Returns:
        The loss in float32 (float64 for float64), reduced as by :func:`infonce_loss`.
    """
    problem = _problem(image_features, text_features, logit_scale, reduction, normalize)
    teacher_a = checks.features("teacher_image_features", cast(teacher_image_features))
    checks.same_device("teacher_image_features", teacher_a, problem.a.device)
    teacher_b = checks.features("teacher_text_features", cast(teacher_text_features), teacher_a)
    for side, teacher, student in (("image", teacher_a, problem.a), ("text", teacher_b, problem.b)):
        if (got := teacher.shape[0]) != student.shape[0]:
            raise ValueError(f"teacher_{side}_features must have {student.shape[0]} rows as the student; got {got}")
    dtype = problem.scale.dtype
    scale = checks.one_element("teacher_logit_scale", teacher_logit_scale, problem.a.device, dtype)
    problem = problem.replace(
        # In the loss's dtype and with the scale in one side: backends then take features alone.
        teacher_a=(scale * teacher_a.to(dtype)).detach(),
        teacher_b=teacher_b.to(dtype).detach(),
        **_weighted(problem, weights, symmetric),
    )
    return _run("distillation_loss", problem, backend)[0]


def sigmoid_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: float | Tensor = 10.0,
    logit_bias: float | Tensor | None = 0.0,
    *,
    targets: Tensor | None = None,
    groups: Ids | None = None,
    ignore_ids: Ids | None = None,
    exclude_self: bool = False,
    weights: Tensor | None = None,
    normalize: bool = False,
    reduction: str = "mean",
    backend: str = "auto",
) -> Tensor:
    r"""Compute the pairwise sigmoid loss (SigLIP, Zhai et al. 2023) without the N x M logits in memory.

    Every pair is a question of its own: ``sum_j -log sigmoid(y_ij (logit_scale <a_i, b_j> + logit_bias))`` per row
    for image ``a_i`` and text ``b_j``, with ``y`` 1 for positives and -1 for all others. ``mean`` divides the sum over
    all pairs by N, as SigLIP does.

    Args:
        image_features: (N, D) float32, bfloat16, float16 (float64 on the reference backend).
        text_features: (M, D), the dtype of ``image_features``.
        logit_scale: see :func:`infonce_loss`; default 10, where SigLIP starts.
        logit_bias: a number or a tensor as ``logit_scale``; None is 0. (SigLIP starts at -10.)
        targets: see :func:`infonce_loss`; so are ``ignore_ids``, ``exclude_self``, ``normalize`` and ``backend``.
        groups: integer ids; equal ids >= 0 are positives, as in :func:`multi_positive_infonce_loss`.
        weights: (N,) weights of the rows, as in :func:`infonce_loss`; the mean becomes the weighted mean.
        reduction: ``mean``, ``sum`` or ``none`` (N,).

    Returns:
        The loss in float32 (float64 for float64).

    Raises:
        TypeError, ValueError: an argument breaks a rule above.
        RuntimeError: the backend asked for cannot run this problem.
    """
    problem = _problem(image_features, text_features, logit_scale, reduction, normalize, exclude_self)
    bias = 0.0 if logit_bias is None else logit_bias
    problem = problem.replace(
        **_ids(problem, targets, groups, ignore_ids),
        **_weighted(problem, weights, symmetric=False),
        bias=checks.one_element("logit_bias", bias, problem.a.device, problem.scale.dtype),
    )
    loss: Tensor = backends.run("sigmoid_loss", backends.SIGMOID, problem, backend)
    return loss


def _run(name: str, problem: Problem, backend: str) -> tuple[Loss, list[Metrics]]:
    found: tuple[Loss, list[Metrics]] = backends.run(name, backends.INFONCE, problem, backend)
    return found


def _problem(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: float | Tensor,
    reduction: str,
    normalize: bool,
    exclude_self: bool = False,
) -> Problem:
    a = checks.features("image_features", cast(image_features))
    # One tensor on both sides stays one.
    b = a if text_features is image_features else checks.features("text_features", cast(text_features), a)
    if a.shape[1] == 0:
        raise ValueError("image_features must have at least 1 feature; got 0")
    checks.choice("reduction", reduction, REDUCTIONS)
    scale = checks.one_element("logit_scale", logit_scale, a.device, checks.computed_in(a.dtype))
    return Problem(a=a, b=b, scale=scale, reduction=reduction, normalize=normalize, exclude_self=exclude_self)


def _ids(p: Problem, targets: Tensor | None, groups: Ids | None, ignore_ids: Ids | None) -> dict[str, Tensor]:
    """Which pairs are positive and which take no part."""
    n, m, device = p.a.shape[0], p.b.shape[0], p.a.device
    found: dict[str, Tensor] = {}
    if targets is not None:
        if groups is not None:
            raise ValueError("targets must be None when groups are given: both define which pairs are positive")
        found["targets"] = checks.integers("targets", targets, n, device)
        checks.targets_in_range(found["targets"], m)
    if groups is not None:
        found["group_a"], found["group_b"] = checks.both_sides("groups", groups, n, m, device)
    if ignore_ids is not None:
        found["ignore_a"], found["ignore_b"] = checks.both_sides("ignore_ids", ignore_ids, n, m, device)
    return found


def _negatives(
    p: Problem, hard: Tensor | None, image_queue: Tensor | None, text_queue: Tensor | None, symmetric: bool
) -> dict[str, Tensor]:
    """Further negatives."""
    if image_queue is not None and not symmetric:
        raise ValueError("image_queue must be None when symmetric=False: only texts see it")
    found: dict[str, Tensor] = {}
    for field, name, queue in (("queue_a", "image_queue", image_queue), ("queue_b", "text_queue", text_queue)):
        if queue is not None:
            found[field] = checks.features(name, cast(queue), p.a)
    if hard is not None:
        found["hard_negatives"] = checks.hard_negatives(cast(hard), p.a)
    return found


def _softened(label_smoothing: float, decoupled: bool) -> dict[str, Any]:
    label_smoothing = check_number("label_smoothing", label_smoothing, *SHARE)
    if decoupled and label_smoothing > 0:
        raise ValueError(f"label_smoothing must be 0 when decoupled=True; got {label_smoothing}")
    return {"label_smoothing": label_smoothing, "decoupled": decoupled}


def _weighted(p: Problem, weights: Weights, symmetric: bool) -> dict[str, Any]:
    counts = (p.a.shape[0], p.b.shape[0]) if symmetric else (p.a.shape[0],)
    found = dict(zip(("weight_a", "weight_b"), checks.row_weights(weights, counts, p.a), strict=False))
    return {"symmetric": symmetric, **found}
