"""Which context tokens a query sees, as kv_range: from where media stand in a text, and from timestamps."""

from __future__ import annotations

import torch

from fastxattn.ops.attention.ranges import check_count, timestamp_kv_range
from fastxattn.packed import PackedTokens


def media_ranges(media: torch.Tensor, tokens_per_media: int, *, previous_only: bool = True) -> torch.Tensor:
    """Ranges by which a text token sees the image it follows, as in Flamingo.

    Args:
        media: (batch, length) boolean, True at the tokens that stand for an image; image n of a sequence is the
            tokens [n * tokens_per_media, (n + 1) * tokens_per_media) of its context.
        tokens_per_media: context tokens of one image.
        previous_only: a token sees the last image at or before it; otherwise all images at or before it.

    Returns:
        (batch, length, 2) int32; empty before the first image.
    """
    if media.dtype != torch.bool or media.ndim != 2:
        raise TypeError(f"media must be boolean of shape (batch, length); got {media.dtype} {tuple(media.shape)}")
    check_count("tokens_per_media", tokens_per_media)
    seen = media.cumsum(1)
    start = (seen - 1).clamp(min=0) if previous_only else torch.zeros_like(seen)
    return (torch.stack([start, seen], dim=-1) * tokens_per_media).clamp(max=2**31 - 1).int()


def time_ranges(
    query_times: torch.Tensor,
    query: PackedTokens,
    context_times: torch.Tensor,
    context: PackedTokens,
    before: float,
    after: float,
) -> torch.Tensor:
    """Ranges by which a query at time t sees the context from t - before to t + after, both ends included.

    Args:
        query_times: (total_q,) packed timestamps, floating or integer.
        query: tokens with the queries' offsets.
        context_times: (total_k,) packed timestamps, ascending within each sequence.
        context: tokens with the context's offsets.
        before: how far back a query looks.
        after: how far ahead.

    Returns:
        (total_q, 2) int32, and errors, of :func:`fastxattn.ops.attention.ranges.timestamp_kv_range`.
    """
    return timestamp_kv_range(query_times, context_times, query.cu_seqlens, context.cu_seqlens, before, after)
