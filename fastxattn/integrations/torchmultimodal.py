"""TorchMultimodal's attention modules, and modules written like them (:func:`fastxattn.register_adapter`)."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from fastxattn.integrations.core import plain_linear, projections, read
from fastxattn.integrations.swap import Adapter
from fastxattn.nn.projected import KeyValueWeights


def _mask(attn_mask: Tensor | None, is_causal: bool, queries: int, keys: int, device: torch.device) -> Tensor | None:
    """A mask as ``scaled_dot_product_attention`` takes it, with its four axes spelled out."""
    if is_causal:
        attn_mask = torch.ones(queries, keys, dtype=torch.bool, device=device).tril()
    while attn_mask is not None and attn_mask.ndim < 4:
        attn_mask = attn_mask[None]
    return attn_mask


class MultiHeadAttentionWithCache(Adapter):
    """For ``MultiHeadAttentionWithCache``: ``q_proj``, ``k_proj``, ``v_proj``, ``output_proj``."""

    does: ClassVar[str] = "attention over valid tokens, which alone are projected"

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
        """As the original's; with a cache, or dropout (which the original applies in evaluation too), that runs."""
        me: Any = self
        out = None
        if past_key_value is None and not use_cache and not me.dropout and query.shape[0] == key.shape[0]:
            out = read(
                me.q_proj(query),
                key,
                _mask(attn_mask, is_causal, query.shape[1], key.shape[1], query.device),
                projections(me.k_proj, me.v_proj),
                heads=me.num_heads,
                scale=(me.q_proj.out_features // me.num_heads) ** -0.5,
                values=None if key is value else value,
            )
        if out is None:
            return super().forward(query, key, value, attn_mask, past_key_value, is_causal, use_cache)  # type: ignore
        return me.output_proj(out)


class MultiHeadSelfAttention(Adapter):
    """For ``MultiHeadSelfAttention``: ``input_proj`` (queries, keys and values), ``output_proj``."""

    does: ClassVar[str] = "attention over valid tokens, which alone are projected"

    def forward(self, query: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Any:
        """As the original's; with dropout, which it applies in evaluation too, that runs."""
        me: Any = self
        out = None
        if not me.dropout and plain_linear(me.input_proj):
            length, biases = query.shape[1], (None, None, None)
            weights = me.input_proj.weight.chunk(3)
            if me.input_proj.bias is not None:
                biases = me.input_proj.bias.chunk(3)
            out = read(
                torch.nn.functional.linear(query, weights[0], biases[0]),
                query,
                _mask(attn_mask, is_causal, length, length, query.device),
                KeyValueWeights(weights[1], weights[2], biases[1], biases[2]),
                heads=me.num_heads,
                scale=(query.shape[-1] // me.num_heads) ** -0.5,
            )
        return super().forward(query, attn_mask, is_causal) if out is None else me.output_proj(out)  # type: ignore
