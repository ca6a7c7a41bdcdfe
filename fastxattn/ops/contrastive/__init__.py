"""Fused contrastive losses: InfoNCE and sigmoid, in O(N D) memory."""

from fastxattn.ops.contrastive.api import explain, infonce_loss, sigmoid_loss
from fastxattn.ops.contrastive.problem import Metrics

__all__ = ["Metrics", "explain", "infonce_loss", "sigmoid_loss"]
