"""Flamingo's masked cross-attention as third-party code writes it (open_flamingo, flamingo-pytorch).

Both have one module: ``norm``, ``to_q``, ``to_kv``, ``to_out``, ``heads``, ``scale`` and
``only_attend_immediate_media``, called with media (batch, media, tokens, width) and the places of media in the text.
:func:`fastxattn.register_adapter` gives this adapter to copies of it under other names::

    register_adapter(MyMaskedCrossAttention, "fastxattn.integrations.flamingo:MaskedCrossAttention")
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from fastxattn.integrations.core import plain_linear, worth
from fastxattn.integrations.kept import may_keep, once
from fastxattn.integrations.masks import Visible
from fastxattn.integrations.swap import Adapter
from fastxattn.nn.projected import ContextKV, KeyValueWeights, attend, cross_attend
from fastxattn.packed import PackedTokens


class MaskedCrossAttention(Adapter):
    """For ``MaskedCrossAttention`` of open_flamingo and flamingo-pytorch."""

    does: ClassVar[str] = "media keys and values once per media set; in training only media that the text sees"

    def forward(self, x: Tensor, media: Tensor, media_locations: Tensor | None = None, **options: Any) -> Tensor:
        """As the original's."""
        me: Any = self
        batch, length = x.shape[:2]
        cached = bool(options.get("use_cached_media", False))
        fits = media_locations is None or cached or media_locations.shape[1] == length
        if media.ndim != 4 or not fits or not worth(x[:, None], media.flatten(1, 2)[:, None]):
            return super().forward(x, media, media_locations, **options)  # type: ignore
        visible = Visible()
        if media_locations is not None:
            times = (
                media_locations.count_nonzero(1)[:, None].expand(-1, length) if cached else media_locations.cumsum(1)
            )
            visible = seen_media(times, media.shape[1], media.shape[2], me.only_attend_immediate_media)
        query = me.to_q(me.norm(x)).unflatten(-1, (me.heads, -1))
        if visible.uniform is not None:
            query = query.masked_fill(visible.uniform[..., None, None], 0)
        rows = query.flatten(0, 1)
        layout = PackedTokens(rows, torch.arange(batch + 1, dtype=torch.int32, device=x.device) * length, length)
        features = media.flatten(1, 2)
        if may_keep(me, media):
            key, value = once(
                me, [me.to_kv], features, lambda t: me.to_kv(t).flatten(0, 1).unflatten(-1, (2, me.heads, -1)).unbind(1)
            )
            packed = PackedTokens.from_padded(features)
            kv = ContextKV(key, value, packed.cu_seqlens, packed.max_seqlen)
            ranges = None if visible.ranges is None else visible.ranges.flatten(0, 1)
            out = attend(rows, layout, kv, kv_range=ranges, scale=me.scale)
        else:
            packed = PackedTokens.from_padded(features, visible.keys)
            ranges = visible.packed_ranges()
            if plain_linear(me.to_kv):
                key_weight, value_weight = me.to_kv.weight.chunk(2)
                biases = (None, None) if me.to_kv.bias is None else me.to_kv.bias.chunk(2)
                weights = KeyValueWeights(key_weight, value_weight, *biases)
                out = cross_attend(rows, layout, packed, weights, kv_range=ranges, scale=me.scale)
            else:
                key, value = me.to_kv(packed.values).unflatten(-1, (2, me.heads, -1)).unbind(1)
                kv = ContextKV(key, value, packed.cu_seqlens, packed.max_seqlen)
                out = attend(rows, layout, kv, kv_range=ranges, scale=me.scale)
        return me.to_out(out.view(batch, length, -1))  # type: ignore[no-any-return]


def seen_media(times: Tensor, count: int, tokens: int, immediate: bool) -> Visible:
    """What text tokens see of ``count`` media of ``tokens`` tokens each.

    Args:
        times: (batch, length), how many media stand at or before each text token.
        count: media per sequence.
        tokens: tokens per medium.
        immediate: a token sees the last of them; otherwise all of them.

    The original hides scores with the lowest finite number, so a token that no medium answers to (text before the
    first one, where all are seen; text after more media than there are, where the last one is) averages all values.
    Before the first medium, with ``immediate``, it zeroes the result instead.
    """
    end = times.clamp(max=count)
    if immediate:
        lost, start = times > count, (times - 1).clamp(min=0)
    else:
        lost, start = times == 0, torch.zeros_like(times)
    start, end = start.masked_fill(lost, 0), end.masked_fill(lost, count)
    ranges = torch.stack([start, end], dim=-1).to(torch.int32) * tokens
    place = torch.arange(count, device=times.device)
    seen = ((start[..., None] <= place) & (place < end[..., None])).any(1)  # (batch, count)
    return Visible(seen.repeat_interleave(tokens, 1), ranges, uniform=lost)
