"""open_clip's losses without their N x N logits. Its models need no adapter: their attention is torch.nn's.

Multi-process losses (``world_size > 1``) gather features as they always did and run the original.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fastxattn.integrations.swap import Adapter
from fastxattn.ops.contrastive import infonce_loss, sigmoid_loss


class _Loss(Adapter):
    does: ClassVar[str] = "contrastive loss in O(N D) memory"
    is_loss: ClassVar[bool] = True

    @classmethod
    def refuses(cls, module: nn.Module, parent: nn.Module | None) -> str | None:
        """Leave distributed losses alone."""
        if module.world_size != 1:
            return "its world_size is not 1; fastxattn.distributed has losses for several processes"
        return None


class ClipLoss(_Loss):
    """For ``open_clip.loss.ClipLoss``."""

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor,
        logit_bias: Tensor | None = None,
        output_dict: bool = False,
    ) -> Any:
        """As the original's; one bias for all logits cancels in the softmax."""
        loss = infonce_loss(image_features, text_features, logit_scale)
        if logit_bias is not None:
            loss = loss + 0.0 * logit_bias.sum()  # its zero gradient, for those who expect every parameter to have one
        return {"contrastive_loss": loss} if output_dict else loss


class CoCaLoss(_Loss):
    """For ``open_clip.loss.CoCaLoss``; the captioning loss stays."""

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logits: Tensor,
        labels: Tensor,
        logit_scale: Tensor,
        output_dict: bool = False,
    ) -> Any:
        """As the original's."""
        me: Any = self
        clip = torch.tensor(0, device=logits.device)
        if me.clip_loss_weight:
            clip = me.clip_loss_weight * infonce_loss(image_features, text_features, logit_scale)
        caption = me.caption_loss(logits.permute(0, 2, 1), labels) * me.caption_loss_weight
        return {"contrastive_loss": clip, "caption_loss": caption} if output_dict else (clip, caption)


class SigLipLoss(_Loss):
    """For ``open_clip.loss.SigLipLoss``."""

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor,
        logit_bias: Tensor | None,
        output_dict: bool = False,
    ) -> Any:
        """As the original's."""
        loss = sigmoid_loss(image_features, text_features, logit_scale, 0.0 if logit_bias is None else logit_bias)
        return {"contrastive_loss": loss} if output_dict else loss
