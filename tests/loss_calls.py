"""InfoNCE and its siblings by their options, for tests that go through all options of one operator."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastxattn import distillation_loss, infonce_loss, multi_positive_infonce_loss

Scale = float | Tensor


def infonce(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Scale,
    *,
    groups: Any = None,
    teacher: tuple[Tensor, Tensor, Scale] | None = None,
    **options: Any,
) -> Any:
    """The function that takes ``groups``, the one that takes a teacher (features and scale), or plain InfoNCE."""
    sides = image_features, text_features, logit_scale
    if groups is not None:
        return multi_positive_infonce_loss(*sides, groups=groups, **options)
    if teacher is not None:
        names = "teacher_image_features", "teacher_text_features", "teacher_logit_scale"
        return distillation_loss(*sides, **dict(zip(names, teacher, strict=True)), **options)
    return infonce_loss(*sides, **options)
