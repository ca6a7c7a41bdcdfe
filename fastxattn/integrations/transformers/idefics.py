"""IDEFICS-1 (Flamingo): keys and values of the images are computed once, not at every generated token."""

from __future__ import annotations

import weakref
from typing import Any, ClassVar

import torch
from torch import Tensor

from fastxattn.integrations.core import attend_padded, pack_keys
from fastxattn.integrations.kept import forget, may_keep, once
from fastxattn.integrations.masks import Visible, recognise
from fastxattn.integrations.swap import Adapter
from fastxattn.integrations.transformers import IMPLEMENTATION
from fastxattn.integrations.transformers.capturing import wants_maps
from fastxattn.ops.attention import varlen_cross_attention

__all__ = ["IdeficsCrossAttention", "IdeficsCrossLayer", "forget"]


class IdeficsCrossLayer(Adapter):
    """For ``IdeficsGatedCrossAttentionLayer``, which sets rows without an image to zero after attending."""

    does: ClassVar[str] = "rows that see no image are skipped (the layer zeroes them)"

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_hidden_states: Tensor | None = None,
        image_attention_mask: Tensor | None = None,
        cross_attention_gate: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> Tensor:
        """As the original's."""
        if (
            image_attention_mask is not None
            and image_attention_mask.is_floating_point()
            and not wants_maps(self, None, kwargs)
        ):
            image_attention_mask = _boolean(image_attention_mask)
        return super().forward(  # type: ignore
            hidden_states,
            attention_mask,
            image_hidden_states,
            image_attention_mask=image_attention_mask,
            cross_attention_gate=cross_attention_gate,
            past_key_values=past_key_values,
            **kwargs,
        )


class IdeficsCrossAttention(Adapter):
    """For ``IdeficsAttention``; its self-attention passes through."""

    does: ClassVar[str] = "image keys and values once per image set, visible images only in training"

    def forward(
        self,
        hidden_states: Tensor,
        key_value_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """As the original's."""
        me: Any = self
        states = key_value_states
        ours = states is not None and me.config._attn_implementation == IMPLEMENTATION and past_key_values is None
        if not ours or wants_maps(self, me.config, kwargs) or states.shape[0] != hidden_states.shape[0]:  # type: ignore
            return super().forward(  # type: ignore
                hidden_states, key_value_states, attention_mask, position_ids, past_key_values, **kwargs
            )
        assert states is not None
        batch, queries = hidden_states.shape[:2]
        visible = recognise(attention_mask, batch, queries, states.shape[1])
        query = me.q_proj(hidden_states).unflatten(-1, (me.num_heads, me.head_dim))
        if me.qk_layer_norms:
            query = me.q_layer_norm(query)
        dropout = me.dropout if me.training else 0.0
        keep = may_keep(me, states)
        if keep or visible.bias is not None:
            layers = [me.k_proj, me.v_proj, *([me.k_layer_norm] if me.qk_layer_norms else [])]
            key, value = once(me, layers, states, lambda x: _project(me, x)) if keep else _project(me, states)
            out = attend_padded(
                query.transpose(1, 2),
                key.transpose(1, 2),
                value.transpose(1, 2),
                visible,
                scale=me.scaling,
                dropout_p=dropout,
            )
        else:
            out = _over_visible(me, query, states, visible, dropout)
        return me.o_proj(out.flatten(2)), None


def _project(module: Any, states: Tensor) -> tuple[Tensor, Tensor]:
    key = module.k_proj(states).unflatten(-1, (module.num_heads, module.head_dim))
    value = module.v_proj(states).unflatten(-1, (module.num_heads, module.head_dim))
    return (module.k_layer_norm(key) if module.qk_layer_norms else key), value


def _over_visible(module: Any, query: Tensor, states: Tensor, visible: Visible, dropout: float) -> Tensor:
    packed = pack_keys(states, visible.keys)
    key, value = _project(module, packed.values)
    batch, length = query.shape[:2]
    starts = torch.arange(batch + 1, dtype=torch.int32, device=query.device) * length
    out = varlen_cross_attention(
        query.flatten(0, 1),
        key,
        value,
        starts,
        packed.cu_seqlens,
        scale=module.scaling,
        kv_range=visible.packed_ranges(),
        dropout_p=dropout,
    )
    return out.unflatten(0, (batch, length))  # type: ignore


_booleans: dict[int, tuple[weakref.ref[Tensor], Tensor]] = {}


def _boolean(mask: Tensor) -> Tensor:
    """The boolean form of an additive mask, one for all layers, so that its structure is looked for once."""
    seen = mask == 0
    if torch.compiler.is_compiling() or mask.is_inference() or mask.device.type != "cpu":
        return seen
    name, known = id(mask), _booleans.get(id(mask))
    if known is None or known[0]() is not mask or not torch.equal(known[1], seen):
        known = (weakref.ref(mask, lambda _: _booleans.pop(name, None)), seen)
        _booleans[name] = known
    return known[1]
