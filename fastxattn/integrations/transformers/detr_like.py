"""DETR's relatives without transformers' attention interface: TableTransformer and Mask2Former."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from fastxattn.integrations.core import projections, read
from fastxattn.integrations.swap import Adapter
from fastxattn.integrations.torch_nn import weights_are_unused, weights_unused
from fastxattn.integrations.transformers.capturing import wants_maps


def _attend(
    module: Any, states: Tensor, positions: Tensor | None, context: Tensor | None, places: Tensor | None, mask: Any
) -> Tensor | None:
    """Attention (batch, length, width) whose positions are added to queries and keys, not to values."""
    query = states if positions is None else states + positions
    values = states if context is None else context
    keys = query if context is None else context if places is None else context + places
    return read(
        module.q_proj(query),
        keys,
        mask,
        projections(module.k_proj, module.v_proj),
        heads=module.num_heads,
        scale=module.scaling,
        dropout_p=module.dropout if module.training else 0.0,
        values=None if keys is values else values,
    )


class TableTransformerAttention(Adapter):
    """For ``TableTransformerAttention``, self- and cross-."""

    does: ClassVar[str] = "attention over the pixels that exist, without the attention map"

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        object_queries: Tensor | None = None,
        key_value_states: Tensor | None = None,
        spatial_position_embeddings: Tensor | None = None,
        output_attentions: bool = False,
    ) -> Any:
        """As the original's; a boolean mask is True for padding there."""
        me: Any = self
        context, out = key_value_states, None
        # Without positions of its own kind the original does not run; its error is the better one.
        runs = object_queries is not None if context is None else spatial_position_embeddings is not None
        if runs and not output_attentions and not wants_maps(self):
            mask = attention_mask
            if mask is not None and mask.dtype == torch.bool:
                mask = ~mask
            out = _attend(me, hidden_states, object_queries, context, spatial_position_embeddings, mask)
        if out is None:
            return super().forward(  # type: ignore
                hidden_states,
                attention_mask,
                object_queries,
                key_value_states,
                spatial_position_embeddings,
                output_attentions,
            )
        return me.out_proj(out), None


class Mask2FormerLayer(Adapter):
    """For ``Mask2FormerMaskedAttentionDecoderLayer``, which computes attention maps that nobody reads."""

    does: ClassVar[str] = "attention maps are computed where they are asked for only"

    def forward(self, *args: Any, output_attentions: bool | None = False, **kwargs: Any) -> Any:
        """As the original's."""
        # The eighth positional argument, if someone passes it so, is this one.
        if output_attentions or len(args) > 7 or wants_maps(self, self.config) or torch.compiler.is_compiling():  # type: ignore[attr-defined]
            return super().forward(*args, output_attentions=output_attentions, **kwargs)  # type: ignore[misc]
        with weights_unused():
            return super().forward(*args, output_attentions=output_attentions, **kwargs)  # type: ignore[misc]


class Mask2FormerAttention(Adapter):
    """For ``Mask2FormerAttention``; tensors are (length, batch, width) there."""

    does: ClassVar[str] = "attention without the attention map"

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_embeddings: Tensor | None = None,
        key_value_states: Tensor | None = None,
        key_value_position_embeddings: Tensor | None = None,
        output_attentions: bool = False,
    ) -> Any:
        """As the original's."""
        me: Any = self
        given = (hidden_states, position_embeddings, key_value_states, key_value_position_embeddings)
        states, positions, context, places = (None if t is None else t.transpose(0, 1) for t in given)
        runs = positions is not None if context is None else places is not None
        out = None
        if runs and not wants_maps(self) and (weights_are_unused() or not output_attentions):
            mask = None if attention_mask is None else attention_mask.unflatten(0, (-1, me.num_heads))
            assert states is not None
            out = _attend(me, states, positions, context, places, mask)
        if out is None:
            return super().forward(  # type: ignore
                hidden_states,
                attention_mask,
                position_embeddings,
                key_value_states,
                key_value_position_embeddings,
                output_attentions,
            )
        return me.out_proj(out).transpose(0, 1), None
