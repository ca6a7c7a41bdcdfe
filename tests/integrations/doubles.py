"""Stand-ins for third-party modules that are not installed: their attributes, signatures and arithmetic."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class MaskedCrossAttention(nn.Module):
    """Flamingo's, with the attributes and the call of open_flamingo's and flamingo-pytorch's."""

    def __init__(self, dim: int, dim_visual: int, dim_head: int = 16, heads: int = 4, immediate: bool = True) -> None:
        super().__init__()
        self.scale, self.heads, self.only_attend_immediate_media = dim_head**-0.5, heads, immediate
        self.norm = nn.LayerNorm(dim)
        self.to_q = nn.Linear(dim, heads * dim_head, bias=False)
        self.to_kv = nn.Linear(dim_visual, 2 * heads * dim_head, bias=False)
        self.to_out = nn.Linear(heads * dim_head, dim, bias=False)

    def forward(
        self, x: Tensor, media: Tensor, media_locations: Tensor | None = None, use_cached_media: bool = False
    ) -> Tensor:
        count, tokens = media.shape[1:3]
        if media_locations is not None and not use_cached_media and media_locations.shape[1] != x.shape[1]:
            raise AssertionError("media_locations and text differ in length")
        query = self.to_q(self.norm(x)).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        key, value = self.to_kv(media.flatten(1, 2)).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        scores = query @ key.mT * self.scale
        if media_locations is None:
            return self._out(scores.softmax(-1) @ value)
        if use_cached_media:
            time = media_locations.count_nonzero(1)[:, None].expand(-1, x.shape[1])
        else:
            time = media_locations.cumsum(1)
        number = (torch.arange(count) + 1).repeat_interleave(tokens)
        same = time[..., None] == number if self.only_attend_immediate_media else time[..., None] >= number
        weights = scores.masked_fill(~same[:, None], -torch.finfo(scores.dtype).max).softmax(-1)
        if self.only_attend_immediate_media:
            weights = weights.masked_fill((time == 0)[:, None, :, None], 0.0)
        return self._out(weights @ value)

    def _out(self, states: Tensor) -> Tensor:
        return self.to_out(states.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class GatedCrossAttentionBlock(nn.Module):
    """Flamingo's block: gated attention over media, then a gated feed-forward."""

    def __init__(self, dim: int, dim_visual: int, immediate: bool = True) -> None:
        super().__init__()
        self.attn = MaskedCrossAttention(dim, dim_visual, immediate=immediate)
        self.attn_gate, self.ff_gate = nn.Parameter(torch.tensor([0.5])), nn.Parameter(torch.tensor([0.5]))
        self.ff = nn.Sequential(
            nn.LayerNorm(dim), nn.Linear(dim, 4 * dim, bias=False), nn.GELU(), nn.Linear(4 * dim, dim, bias=False)
        )

    def forward(self, x: Tensor, media: Tensor, media_locations: Tensor | None = None, **options: Any) -> Tensor:
        x = self.attn(x, media, media_locations=media_locations, **options) * self.attn_gate.tanh() + x
        return self.ff(x) * self.ff_gate.tanh() + x  # type: ignore[no-any-return]


class WithCache(NamedTuple):
    attn_output: Tensor
    past_key_value: tuple[Tensor, Tensor]


class MultiHeadAttentionWithCache(nn.Module):
    """TorchMultimodal's attention for decoders."""

    def __init__(self, dim_q: int, dim_kv: int, num_heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.num_heads, self.dropout = num_heads, dropout
        self.q_proj, self.output_proj = nn.Linear(dim_q, dim_q), nn.Linear(dim_q, dim_q)
        self.k_proj, self.v_proj = nn.Linear(dim_kv, dim_q), nn.Linear(dim_kv, dim_q)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        past_key_value: tuple[Tensor, Tensor] | None = None,
        is_causal: bool = False,
        use_cache: bool = False,
    ) -> Any:
        q, k, v = (
            proj(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for proj, x in ((self.q_proj, query), (self.k_proj, key), (self.v_proj, value))
        )
        if past_key_value is not None:
            k, v = torch.cat([past_key_value[0], k], 2), torch.cat([past_key_value[1], v], 2)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask, self.dropout, is_causal)
        out = self.output_proj(out.transpose(1, 2).flatten(2))
        return WithCache(out, (k, v)) if use_cache else out


class MultiHeadSelfAttention(nn.Module):
    """TorchMultimodal's attention for encoders."""

    def __init__(self, embed_dim: int, num_heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.num_heads, self.dropout = num_heads, dropout
        self.input_proj, self.output_proj = nn.Linear(embed_dim, 3 * embed_dim), nn.Linear(embed_dim, embed_dim)

    def forward(self, query: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        q, k, v = self.input_proj(query).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask, self.dropout, is_causal)
        return self.output_proj(out.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class MultimodalLayer(nn.Module):
    """A decoder layer in TorchMultimodal's style: self-attention, then cross-attention over an image."""

    def __init__(self, width: int = 64, heads: int = 4) -> None:
        super().__init__()
        self.attention, self.cross = MultiHeadSelfAttention(width, heads), MultiHeadAttentionWithCache(width, 48, heads)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, text: Tensor, image: Tensor, text_mask: Tensor, image_mask: Tensor) -> Tensor:
        text = text + self.attention(self.norm1(text), text_mask[:, None, None])
        return text + self.cross(self.norm2(text), image, image, image_mask[:, None, None])  # type: ignore[no-any-return]


class ClipLoss(nn.Module):
    """open_clip's, for one process."""

    def __init__(self, world_size: int = 1) -> None:
        super().__init__()
        self.world_size = world_size

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor,
        logit_bias: Tensor | None = None,
        output_dict: bool = False,
    ) -> Any:
        logits = logit_scale * image_features @ text_features.T + (0 if logit_bias is None else logit_bias)
        labels = torch.arange(len(logits))
        loss = (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2
        return {"contrastive_loss": loss} if output_dict else loss


class CoCaLoss(ClipLoss):
    """The same and a captioning loss."""

    def __init__(self, caption_loss_weight: float, clip_loss_weight: float, pad_id: int = 0) -> None:
        super().__init__()
        self.clip_loss_weight, self.caption_loss_weight = clip_loss_weight, caption_loss_weight
        self.caption_loss = nn.CrossEntropyLoss(ignore_index=pad_id)

    def forward(  # type: ignore[override]
        self,
        image_features: Tensor,
        text_features: Tensor,
        logits: Tensor,
        labels: Tensor,
        logit_scale: Tensor,
        output_dict: bool = False,
    ) -> Any:
        clip = self.clip_loss_weight * super().forward(image_features, text_features, logit_scale)
        caption = self.caption_loss_weight * self.caption_loss(logits.permute(0, 2, 1), labels)
        return {"contrastive_loss": clip, "caption_loss": caption} if output_dict else (clip, caption)


class SigLipLoss(nn.Module):
    """open_clip's sigmoid loss, for one process."""

    def __init__(self, world_size: int = 1) -> None:
        super().__init__()
        self.world_size = world_size

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor,
        logit_bias: Tensor | None,
        output_dict: bool = False,
    ) -> Any:
        logits = logit_scale * image_features @ text_features.T + (0 if logit_bias is None else logit_bias)
        signs = 2 * torch.eye(len(logits), dtype=logits.dtype) - 1
        loss = -F.logsigmoid(signs * logits).sum() / len(logits)
        return {"contrastive_loss": loss} if output_dict else loss
