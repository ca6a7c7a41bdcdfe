"""GroundingDINO's fusion of image and text, with every projection of the image folded into the few text tokens.

The layer projects tens of thousands of image tokens x (width d) three times to four heads of width e = 4d, and
attends in both directions. With few text tokens t it is cheaper the other way round; per head h::

    s    = (x Q_h^T + q_h) (k_h)^T              = x (k_h Q_h)^T + q_h k_h^T     text keys folded to width d, and a
                                                                               bias per text key
    image += softmax_t(s) v_h O_h^T             = softmax_t(s) (v_h O_h^T)     text values folded to width d
    text  += softmax_x(s^T) (x V_h^T + b_h)     = (softmax_x(s^T) x) V_h^T + b_h

so an image token costs 3 d t heads instead of 3 d e + 3 e t. Exact algebra. The original's clamp at 50000 and its
subtractions of maxima only guard float16 against overflow; the softmax is the same without them.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from fastxattn.integrations.core import plain_linear, projections, read, worth
from fastxattn.integrations.swap import Adapter
from fastxattn.integrations.transformers.capturing import drops_maps, wants_maps
from fastxattn.nn.projected import KeyValueWeights, attend_features
from fastxattn.ops.attention import cross_attention
from fastxattn.packed import PackedTokens


class Fusion(Adapter):
    """For ``*GroundingDinoBiMultiHeadAttention``, of GroundingDINO and MM-GroundingDINO."""

    does: ClassVar[str] = "both directions without the map; image projections folded into the text tokens"

    def forward(
        self,
        vision_features: Tensor,
        text_features: Tensor,
        vision_attention_mask: Tensor | None = None,
        text_attention_mask: Tensor | None = None,
    ) -> tuple[tuple[Tensor, Tensor | None], tuple[Tensor, Tensor | None]]:
        """As the original's; masks are True for padding."""
        me: Any = self
        linears = (me.vision_proj, me.values_vision_proj, me.out_vision_proj)
        dropout = me.dropout if me.training else 0.0
        texts, width = text_features.shape[1], vision_features.shape[2]
        folds = texts * me.num_heads < me.embed_dim and width <= 256 and plain_linear(*linears) and dropout == 0.0
        small = not worth(vision_features[:, None], text_features[:, None])
        if small or not folds or wants_maps(self) or torch.is_autocast_enabled(vision_features.device.type):
            return super().forward(vision_features, text_features, vision_attention_mask, text_attention_mask)  # type: ignore
        heads = (me.num_heads, me.head_dim)
        text_key = me.text_proj(text_features).unflatten(-1, heads)  # (B, T, H, E)
        text_value = me.values_text_proj(text_features).unflatten(-1, heads)
        text_there = None if text_attention_mask is None else ~text_attention_mask.bool()
        # Image reads text: the image tokens themselves are the queries, the same for all heads.
        query_weight = me.vision_proj.weight.unflatten(0, heads)  # (H, E, d)
        out_weight = me.out_vision_proj.weight.unflatten(1, heads)  # (d, H, E)
        folded_key = torch.einsum("bthe,hed->bthd", text_key, query_weight)
        folded_value = torch.einsum("bthe,dhe->bthd", text_value, out_weight)
        key_bias = torch.einsum("bthe,he->bth", text_key, me.vision_proj.bias.view(heads)) * me.scale
        image = cross_attention(
            vision_features.unsqueeze(2).expand(-1, -1, me.num_heads, -1),
            folded_key,
            folded_value,
            key_mask=text_there,
            key_bias=key_bias.float(),
            scale=me.scale,
        )
        image = image.sum(2) + me.out_vision_proj.bias
        # Text reads image: queries are few, so the image stays as it is.
        there = None if vision_attention_mask is None else ~vision_attention_mask.bool()
        packed = PackedTokens.from_padded(vision_features, there)
        layout = PackedTokens.from_padded(text_key)
        weights = KeyValueWeights(
            me.vision_proj.weight, me.values_vision_proj.weight, me.vision_proj.bias, me.values_vision_proj.bias
        )
        text = attend_features(layout.values, layout, packed, weights, scale=me.scale)
        return (image, None), (me.out_text_proj(text.view(*text_features.shape[:2], -1)), None)


class MultiheadAttention(Adapter):
    """For ``*GroundingDinoMultiheadAttention``: text, queries, and queries on text."""

    does: ClassVar[str] = "attention over valid tokens, without the attention map"

    def forward(
        self,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        attention_mask: Tensor | None = None,
        output_attentions: bool | None = False,
    ) -> tuple[Tensor | None, ...]:
        """As the original's; layers ask for maps always, so they are made where the encoder or decoder is asked."""
        me: Any = self
        out = None
        asked = wants_maps(self) or (output_attentions and not drops_maps(self))
        if not asked and queries.shape[0] == keys.shape[0]:
            out = read(
                me.query(queries),
                keys,
                attention_mask,
                projections(me.key, me.value),
                heads=me.num_attention_heads,
                scale=me.attention_head_size**-0.5,
                dropout_p=me.dropout.p if me.training else 0.0,
                values=None if keys is values else values,
            )
        if out is None:
            return super().forward(queries, keys, values, attention_mask, output_attentions)  # type: ignore
        return (me.out_proj(out), None) if output_attentions else (me.out_proj(out),)
