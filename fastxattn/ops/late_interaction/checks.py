"""Validation: a message names the argument, the rule and the value got, before any memory is touched."""

from __future__ import annotations

import torch

from fastxattn.ops.checks import POSITIVE, check_number, check_offsets
from fastxattn.ops.contrastive.checks import choice, features, same_device

DIRECTIONS = ("a", "b", "both")


def check_arguments(
    a: torch.Tensor,
    b: torch.Tensor,
    cu_seqlens_a: torch.Tensor,
    cu_seqlens_b: torch.Tensor,
    direction: str,
    reduction: str,
    smooth: float | None,
) -> None:
    """Refuse what does not fit together; offsets' contents are looked at where that costs no wait."""
    features("b", b, features("a", a))
    if a.shape[1] == 0:
        raise ValueError("a must have at least 1 feature; got 0")
    choice("direction", direction, DIRECTIONS)
    choice("reduction", reduction, ("sum", "mean"))
    if smooth is not None:
        check_number("smooth", smooth, *POSITIVE)
    for name, offsets, rows in (("cu_seqlens_a", cu_seqlens_a, a.shape[0]), ("cu_seqlens_b", cu_seqlens_b, b.shape[0])):
        check_offsets(name, offsets, rows)
        same_device(name, offsets, a.device)


def check_pairs(cu_seqlens_a: torch.Tensor, cu_seqlens_b: torch.Tensor) -> None:
    """Refuse sides with different numbers of sets; what is no tensor of offsets is refused by the other checks."""
    if not (isinstance(cu_seqlens_a, torch.Tensor) and isinstance(cu_seqlens_b, torch.Tensor)):
        return
    if cu_seqlens_a.shape != cu_seqlens_b.shape:
        n, m = cu_seqlens_a.numel(), cu_seqlens_b.numel()
        raise ValueError(f"cu_seqlens_b must have as many offsets as cu_seqlens_a, {n}; got {m}")
