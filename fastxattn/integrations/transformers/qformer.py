"""BLIP-2 and InstructBLIP Q-Formers: image features are packed once per forward and shared by all layers.

Half to three quarters of a Q-Former's time goes into projecting image features to keys and values, padding included.
The encoder packs the features that exist; its cross-attention layers project those alone, or, with fewer queries than
head_dim, fold the projections into query and output and attend to the raw features.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from fastxattn.integrations.core import pack_keys, projections, read
from fastxattn.integrations.masks import PackedMask, recognise
from fastxattn.integrations.swap import Adapter
from fastxattn.integrations.transformers import IMPLEMENTATION
from fastxattn.integrations.transformers.capturing import wants_maps


class QFormerEncoder(Adapter):
    """For ``Blip2QFormerEncoder`` and ``InstructBlipQFormerEncoder``."""

    does: ClassVar[str] = "packs image features once per forward for all cross-attention layers"

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        query_length: int = 0,
        **kwargs: Any,
    ) -> Any:
        """As the original's."""
        config: Any = self.config  # type: ignore[attr-defined]
        features = encoder_hidden_states
        if encoder_attention_mask is not None and 0 < query_length < encoder_attention_mask.shape[2]:
            # The mask has a row for each text token too, but only the learned queries read the features.
            encoder_attention_mask = encoder_attention_mask[:, :, :query_length]
        if (
            features is not None
            and config._attn_implementation == IMPLEMENTATION
            and not wants_maps(self, config, kwargs)
        ):
            batch = max(features.shape[0], hidden_states.shape[0])
            visible = recognise(encoder_attention_mask, batch, query_length, features.shape[1])
            if (
                visible.bias is visible.ranges is visible.uniform is None
                and features.shape[0] == hidden_states.shape[0]
            ):
                packed = pack_keys(features, visible.keys)
                encoder_hidden_states = packed.values[None]
                encoder_attention_mask = PackedMask(packed.cu_seqlens, packed.max_seqlen)  # type: ignore[assignment]
        return super().forward(  # type: ignore[misc]
            hidden_states, attention_mask, encoder_hidden_states, encoder_attention_mask, query_length, **kwargs
        )


class QFormerAttention(Adapter):
    """For the Q-Formers' ``*QFormerMultiHeadAttention``."""

    does: ClassVar[str] = "cross-attention projects packed features only, or absorbs the projections"

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | PackedMask | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """As the original's."""
        me: Any = self
        if encoder_hidden_states is None or not isinstance(encoder_attention_mask, PackedMask):
            return super().forward(  # type: ignore
                hidden_states, attention_mask, encoder_hidden_states, encoder_attention_mask, **kwargs
            )
        out = read(
            me.query(hidden_states),
            encoder_hidden_states,
            encoder_attention_mask,
            projections(me.key, me.value),
            heads=me.num_attention_heads,
            scale=me.scaling,
            dropout_p=me.attention_dropout if me.training else 0.0,
        )
        assert out is not None
        return out, None
