"""Perceiver and the Perceiver resamplers of IDEFICS-1 and Idefics2: few latents over many input tokens."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from fastxattn.integrations.core import attend_padded, projections, read, worth
from fastxattn.integrations.masks import Visible, recognise
from fastxattn.integrations.swap import Adapter
from fastxattn.integrations.transformers import IMPLEMENTATION
from fastxattn.integrations.transformers.capturing import wants_maps
from fastxattn.ops.attention import varlen_cross_attention


class PerceiverAttention(Adapter):
    """For ``PerceiverSelfAttention``, cross- and self-."""

    does: ClassVar[str] = "attention without the attention map; only inputs that exist are projected"

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        inputs: Tensor | None = None,
        inputs_mask: Tensor | None = None,
        output_attentions: bool | None = False,
    ) -> tuple[Tensor, ...]:
        """As the original's."""
        me: Any = self
        width = max(me.qk_channels_per_head, me.v_channels_per_head)
        if output_attentions or wants_maps(self) or width > 256:
            return super().forward(hidden_states, attention_mask, inputs, inputs_mask, output_attentions)  # type: ignore
        latents = me.layernorm1(hidden_states)
        features = latents if inputs is None else me.layernorm2(inputs)
        out = None
        if features.shape[0] == latents.shape[0]:
            out = read(
                me.query(latents),
                features,
                attention_mask if inputs is None else inputs_mask,
                projections(me.key, me.value),
                heads=me.num_heads,
                scale=me.qk_channels_per_head**-0.5,
                dropout_p=me.dropout.p if me.training else 0.0,
            )
        if out is None:
            return super().forward(hidden_states, attention_mask, inputs, inputs_mask, output_attentions)  # type: ignore
        return (out,)


class Idefics2Resampler(Adapter):
    """For ``Idefics2PerceiverAttention``: keys are an image's patches, then the latents."""

    does: ClassVar[str] = "projects the patches that exist; grouped heads without expansion"

    def forward(
        self,
        latents: Tensor,
        context: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """As the original's."""
        me: Any = self
        batch, count, _ = latents.shape
        visible = None
        if (
            me.config._attn_implementation == IMPLEMENTATION
            and past_key_values is None
            and not wants_maps(self, me.config, kwargs)
        ):
            visible = recognise(attention_mask, batch, count, context.shape[1] + count)
        if visible is None or visible.keys is None or not visible.bias is visible.uniform is None:
            return super().forward(latents, context, attention_mask, position_ids, past_key_values, **kwargs)  # type: ignore
        rows = torch.cat([context, latents], dim=1).flatten(0, 1)[visible.keys.flatten()]
        starts = torch.nn.functional.pad(visible.keys.sum(1).cumsum(0), (1, 0)).to(torch.int32)
        offsets = torch.arange(batch + 1, dtype=torch.int32, device=latents.device) * count
        out = varlen_cross_attention(
            me.q_proj(latents).view(batch * count, me.num_heads, me.head_dim),
            me.k_proj(rows).unflatten(-1, (me.num_key_value_heads, me.head_dim)),
            me.v_proj(rows).unflatten(-1, (me.num_key_value_heads, me.head_dim)),
            offsets,
            starts,
            scale=me.scaling,
            kv_range=visible.packed_ranges(),
            dropout_p=me.attention_dropout if me.training else 0.0,
        )
        return me.o_proj(out.reshape(batch, count, -1)), None


class IdeficsResampler(Adapter):
    """For ``IdeficsPerceiverAttention``."""

    does: ClassVar[str] = "attention without the attention map; context and latents concatenated once"

    def forward(self, context: Tensor, latents: Tensor) -> Tensor:
        """As the original's."""
        me: Any = self
        if wants_maps(self) or not worth(latents[:, None, :, : me.head_dim], context[:, None]):
            return super().forward(context, latents)  # type: ignore
        latents = me.latents_layer_norm(latents)
        tokens = torch.cat([me.context_layer_norm(context), latents], dim=-2)
        query, key, value = (
            proj(x).unflatten(-1, (me.n_heads, me.head_dim)).transpose(1, 2)
            for proj, x in ((me.q_proj, latents), (me.k_proj, tokens), (me.v_proj, tokens))
        )
        if me.qk_layer_norms:
            query, key = me.q_layer_norm(query), me.k_layer_norm(key)
        return me.output_proj(attend_padded(query, key, value, Visible(), scale=me.qk_scale).flatten(2))  # type: ignore
