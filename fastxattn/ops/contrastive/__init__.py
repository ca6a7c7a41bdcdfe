"""Fused contrastive losses: InfoNCE, multi-positive InfoNCE, distillation and sigmoid, in O(N D) memory."""

from fastxattn.ops.contrastive.api import (
    distillation_loss,
    infonce_loss,
    multi_positive_infonce_loss,
    sigmoid_loss,
)
from fastxattn.ops.contrastive.problem import Metrics

__all__ = ["Metrics", "distillation_loss", "infonce_loss", "multi_positive_infonce_loss", "sigmoid_loss"]
