"""Public functions of late interaction: validation, then dispatch."""

from __future__ import annotations

from typing import Any, Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from fastxattn.ops.contrastive.checks import computed_in, one_element
from fastxattn.ops.late_interaction import backends, checks
from fastxattn.ops.late_interaction.problem import Problem, SmoothProblem
from fastxattn.runtime.autocast import cast


@overload
def maxsim(
    a: Tensor,
    b: Tensor,
    cu_seqlens_a: Tensor,
    cu_seqlens_b: Tensor,
    *,
    direction: Literal["a", "b"] = "a",
    reduction: str = "sum",
    smooth: float | None = None,
    backend: str = "auto",
) -> Tensor: ...
@overload
def maxsim(
    a: Tensor,
    b: Tensor,
    cu_seqlens_a: Tensor,
    cu_seqlens_b: Tensor,
    *,
    direction: Literal["both"],
    reduction: str = "sum",
    smooth: float | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]: ...
def maxsim(
    a: Tensor,
    b: Tensor,
    cu_seqlens_a: Tensor,
    cu_seqlens_b: Tensor,
    *,
    direction: str = "a",
    reduction: str = "sum",
    smooth: float | None = None,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Compute late-interaction scores of every set of ``a`` against every set of ``b``.

    ``score[n, m] = sum_{t in a_n} max_{s in b_m} <a_t, b_s>`` (ColBERT's MaxSim, Khattab & Zaharia 2020); direction
    ``b`` sums over b's tokens instead, and ``both`` gives the two from one pass over the similarities (FILIP, Yao et
    al. 2022). The similarities are never stored; the places of the maxima are, for the gradient. With one token a set
    on side ``a`` this is BLIP-2's maximum over query tokens.

    Args:
        a: (tokens_a, D) float32, bfloat16 or float16 (float64 on the reference backend); under autocast see
            :func:`fastxattn.runtime.autocast.cast`.
        b: (tokens_b, D), the dtype of ``a``.
        cu_seqlens_a: (N + 1,) int32, where each set of ``a`` starts; rows past its last entry are never read.
        cu_seqlens_b: (M + 1,) int32.
        direction: ``a``, ``b`` or ``both``.
        reduction: ``sum``, or ``mean`` over the set's tokens.
        smooth: a temperature, positive and finite: the maximum becomes ``smooth * logsumexp(. / smooth)``; not on the
            cpu backend.
        backend: ``auto``, ``cpu``, ``triton``, ``cuda`` or ``reference``.

    Returns:
        (N, M) float32 (float64 for float64); a pair of them for ``both``. A set without tokens on either side scores 0.
        Of equal matches the first takes the gradient.

    Raises:
        TypeError, ValueError: an argument breaks a rule above.
        RuntimeError: the backend asked for cannot run this problem.
    """
    a, b = cast(a), cast(b)
    checks.check_arguments(a, b, cu_seqlens_a, cu_seqlens_b, direction, reduction, smooth)
    given = {"a": a, "b": b, "cu_a": cu_seqlens_a, "cu_b": cu_seqlens_b}
    fields: dict[str, Any] = {name: t.contiguous() for name, t in given.items()}
    both = direction == "both"
    fields |= {"from_a": both or direction == "a", "from_b": both or direction == "b"}
    problem = Problem(**fields) if smooth is None else SmoothProblem(**fields, smooth=float(smooth))
    sums = backends.run(problem, backend)
    if reduction == "mean":
        lengths_a, lengths_b = (cu.diff().clamp(min=1) for cu in (cu_seqlens_a, cu_seqlens_b))
        sums = sums[0] / lengths_a[: sums[0].shape[0], None], sums[1] / lengths_b
    return sums if both else sums[0] if direction == "a" else sums[1]


def late_interaction_loss(
    a: Tensor,
    b: Tensor,
    cu_seqlens_a: Tensor,
    cu_seqlens_b: Tensor,
    logit_scale: float | Tensor = 1 / 0.07,
    *,
    reduction: str = "mean",
    smooth: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Compute FILIP's loss: InfoNCE over :func:`maxsim` scores, set ``n`` of ``a`` belonging to set ``n`` of ``b``.

    Rows compare a's sets over mean-of-best scores from a's tokens, columns compare b's over those from b's tokens;
    both come from one pass in memory proportional to the tokens and the N x N scores.

    Args:
        a: see :func:`maxsim`; so are ``b``, ``cu_seqlens_a``, ``cu_seqlens_b`` (N + 1 entries each) and ``smooth``.
        b: tokens of the other side.
        cu_seqlens_a: offsets of a's sets.
        cu_seqlens_b: offsets of b's sets.
        logit_scale: a number or a tensor of one element, as in :func:`fastxattn.infonce_loss`; default 1 / 0.07, where
            CLIP and FILIP start.
        reduction: ``mean`` (FILIP) or ``sum`` (ColBERT) over a set's tokens.
        smooth: temperature of a smooth maximum.
        backend: ``auto``, ``cpu``, ``triton``, ``cuda`` or ``reference``.

    Returns:
        The loss in float32 (float64 for float64); 0 without sets.

    Raises:
        ValueError: the sides differ in sets, or an argument breaks a rule of :func:`maxsim`.
    """
    checks.check_pairs(cu_seqlens_a, cu_seqlens_b)
    rows, columns = maxsim(
        a, b, cu_seqlens_a, cu_seqlens_b, direction="both", reduction=reduction, smooth=smooth, backend=backend
    )
    scale = one_element("logit_scale", logit_scale, a.device, computed_in(a.dtype))
    labels = torch.arange(rows.shape[0], device=a.device)
    if labels.numel() == 0:
        return (rows.sum() + columns.sum()) * scale
    return (F.cross_entropy(scale * rows, labels) + F.cross_entropy(scale * columns.T, labels)) / 2
