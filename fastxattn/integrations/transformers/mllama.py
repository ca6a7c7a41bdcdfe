"""Mllama's cross-attention: tiles that no text token sees are neither projected nor attended to."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fastxattn.integrations.core import query_offsets
from fastxattn.integrations.masks import PackedMask, recognise
from fastxattn.integrations.swap import Adapter
from fastxattn.integrations.transformers import IMPLEMENTATION
from fastxattn.integrations.transformers.capturing import wants_maps
from fastxattn.ops.attention import varlen_cross_attention


class MllamaCrossAttention(Adapter):
    """For ``MllamaTextCrossAttention``.

    transformers lets a text row without an image see *every* tile, padding included (its mask row is all zeros); that
    is what this gives too. :func:`no_image_rows` chooses the original Llama code's zeros instead.
    """

    does: ClassVar[str] = "projects and attends to the image tiles that some text token sees"

    def forward(
        self,
        hidden_states: Tensor,
        cross_attention_states: Tensor | None = None,
        past_key_values: Any = None,
        attention_mask: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """As the original's."""
        me: Any = self
        states, batch = cross_attention_states, hidden_states.shape[0]
        visible = None
        ours = me.config._attn_implementation == IMPLEMENTATION and not wants_maps(self, me.config, kwargs)
        if states is not None and ours and states.shape[0] == batch and _starts(past_key_values, me.layer_idx):
            attention_mask = _without_image_rows(me, attention_mask)
            visible = recognise(attention_mask, batch, hidden_states.shape[1], states.shape[1])
        if states is None and past_key_values is not None:
            _check_later_step(past_key_values.layers[me.layer_idx], attention_mask)
        if states is None or visible is None or visible.keys is None or not visible.bias is visible.uniform is None:
            return super().forward(  # type: ignore
                hidden_states, states, past_key_values, attention_mask, use_cache, **kwargs
            )
        rows = visible.keys.reshape(-1).nonzero().squeeze(1)
        kept = _take(states.flatten(0, 1), rows)
        key = me.k_norm(me.k_proj(kept).unflatten(-1, (me.num_key_value_heads, me.head_dim)))
        value = me.v_proj(kept).unflatten(-1, (me.num_key_value_heads, me.head_dim))
        if past_key_values is not None:
            # The cache keeps its dense form, with zeros at the tiles that the mask hides from every later step too.
            dense = [_scatter(t, rows, batch, states.shape[1]) for t in (key, value)]
            past_key_values.update(*dense, me.layer_idx)
            past_key_values.layers[me.layer_idx]._fastxattn_present = visible.keys
        query = me.q_norm(me.q_proj(hidden_states).unflatten(-1, (me.num_heads, me.head_dim)))
        counts = visible.keys.sum(1, dtype=torch.int32)
        starts = torch.nn.functional.pad(counts.cumsum(0, dtype=torch.int32), (1, 0))
        offsets, longest = query_offsets(PackedMask(starts, 0), batch, hidden_states.shape[1], hidden_states.device)
        out = varlen_cross_attention(
            query.flatten(0, 1),
            key,
            value,
            offsets,
            starts,
            longest,
            states.shape[1],
            scale=me.scaling,
            kv_range=visible.packed_ranges(),
            dropout_p=me.dropout if me.training else 0.0,
        )
        return me.o_proj(out.reshape(*hidden_states.shape[:2], -1)), None


def no_image_rows(model: nn.Module, rule: str) -> None:
    """What text rows without an image get from accelerated cross-attention layers of ``model``.

    Args:
        model: an accelerated Mllama model.
        rule: "hf" (as transformers: they see every tile) or "meta" (as the original Llama code: zeros).
    """
    if rule not in ("hf", "meta"):
        raise ValueError(f"rule must be 'hf' or 'meta'; got {rule!r}")
    for module in model.modules():
        if isinstance(module, MllamaCrossAttention):
            vars(module)["_fastxattn_no_image_rows"] = rule


def _without_image_rows(module: nn.Module, mask: Tensor | None) -> Tensor | None:
    if mask is None or vars(module).get("_fastxattn_no_image_rows", "hf") == "hf":
        return mask
    # Prepared masks are 0 or finfo.min; a row of zeros is a row without an image (or with every tile, which a model
    # with padding tiles cannot have told apart either).
    hidden = mask < 0
    return ~hidden & hidden.any(-1, keepdim=True)


def _check_later_step(layer: Any, mask: Tensor | None) -> None:
    """Tiles that no earlier text saw were not projected: refuse a step that looks at them (on the CPU)."""
    present = getattr(layer, "_fastxattn_present", None)
    if present is None or mask is None or mask.device.type != "cpu" or torch.compiler.is_compiling():
        return
    seen = (mask >= 0).flatten(0, 2) if mask.shape[0] == 1 else (mask >= 0).any(2)[:, 0]
    there = present if present.shape[0] == seen.shape[0] else present.any(0)
    if bool((seen & ~there).any()):
        raise RuntimeError(
            "a text token sees image tiles that no token of the first call saw, and the cache holds nothing for them; "
            "run the whole prompt in one call, or restore(model) for chunked prompts"
        )


def _starts(cache: Any, layer: int) -> bool:
    """Whether ``cache`` holds nothing for this layer yet (a second image extends what is there)."""
    return cache is None or cache.get_seq_length(layer) == 0


def _take(tokens: Tensor, rows: Tensor) -> Tensor:
    """Those rows of ``tokens``; on the CPU uncopied where they lie together, as one image's first tiles do."""
    if tokens.device.type == "cpu" and not torch.compiler.is_compiling() and rows.numel() > 0:
        first, last = int(rows[0]), int(rows[-1])
        if last - first + 1 == rows.numel():
            return tokens[first : last + 1]
    return tokens.index_select(0, rows)


def _scatter(packed: Tensor, rows: Tensor, batch: int, length: int) -> Tensor:
    dense = packed.new_zeros(batch * length, *packed.shape[1:]).index_copy(0, rows, packed)
    return dense.unflatten(0, (batch, length)).transpose(1, 2)  # type: ignore
