"""Scores that strategies rank by: attention received, relevance to a text, change between video frames."""

from __future__ import annotations

import torch
from torch import Tensor

from fastxattn.ops.attention import varlen_cross_attention
from fastxattn.ops.checks import check_offsets
from fastxattn.ops.importance import key_importance
from fastxattn.ops.pruning import segments
from fastxattn.ops.pruning.checks import check_device, check_rows


def probe_scores(query: Tensor, key: Tensor, cu_seqlens: Tensor, scale: float | None = None) -> Tensor:
    """Attention of one query per sequence over its keys, averaged over heads: (total,) float32, summing to 1.

    ``score[i] = mean over heads of softmax_i(scale * <query[b], key[i]>)``: one row of the attention map, computed
    without the map. The query is the CLS token's (EViT, FasterVLM) or the last text token's (FastV).

    Args:
        query: (batch, heads, head_dim).
        key: (total, kv_heads, head_dim); heads a multiple of kv_heads.
        cu_seqlens: (batch + 1,) int32 offsets of the keys.
        scale: 1 / sqrt(head_dim) when None.
    """
    check_rows("query", query)
    check_rows("key", key)
    if query.ndim != 3 or key.ndim != 3 or query.shape[1] % key.shape[1] or query.shape[2] != key.shape[2]:
        raise ValueError(
            "query and key must have shapes (batch, heads, head_dim) and (total, kv_heads, head_dim) with heads a "
            f"multiple of kv_heads; got {tuple(query.shape)} and {tuple(key.shape)}"
        )
    check_offsets("cu_seqlens", cu_seqlens, key.shape[0])
    check_device("query", query, "key", key)
    check_device("cu_seqlens", cu_seqlens, "key", key)
    batch, heads, dim = query.shape
    if batch != cu_seqlens.shape[0] - 1:
        raise ValueError(f"query must have one row per sequence, {cu_seqlens.shape[0] - 1}; got {batch}")
    row = segments.sequence_ids(cu_seqlens, key.shape[0])
    inside = (row < batch)[:, None]
    row = row.clamp_max(max(batch - 1, 0))
    if batch == 0 or key.shape[0] == 0:
        return key.new_zeros(key.shape[0], dtype=torch.float32)
    grouped = query.float().unflatten(1, (key.shape[1], -1)) * (dim**-0.5 if scale is None else scale)
    # Rows beyond the last sequence may hold anything, and 0 * NaN in the query's gradient is NaN.
    keys = torch.where(inside[:, None], key.float(), 0.0)
    logits = torch.einsum("tgrd,tgd->tgr", grouped[row], keys).flatten(1)
    logits = torch.where(inside, logits, -torch.inf)
    index = row[:, None].expand(-1, heads)
    peak = logits.new_full((batch, heads), -torch.inf).scatter_reduce(0, index, logits.detach(), "amax")
    weight = torch.where(inside, (logits - peak.gather(0, index)).exp(), 0.0)
    total = weight.new_zeros(batch, heads).scatter_add(0, index, weight)
    return (weight / total.gather(0, index)).mean(1)


def received_scores(
    query: Tensor, key: Tensor, cu_seqlens: Tensor, scale: float | None = None, *, max_seqlen: int | None = None
) -> Tensor:
    """Attention each key receives from all queries of its sequence, averaged: (total,) float32, summing to 1.

    For encoders without a CLS token (SigLIP), and with text tokens as queries (SparseVLM-like raters).

    Args:
        query, key: (total, heads, head_dim), (total, kv_heads, head_dim) of the same packed tokens.
        cu_seqlens: (batch + 1,) int32.
        scale: 1 / sqrt(head_dim) when None.
        max_seqlen: a bound on the lengths.
    """
    value = key[..., : min(16, key.shape[-1])].contiguous()
    longest = key.shape[0] if max_seqlen is None else max_seqlen
    # Only the log-sum-exp is used here; a narrow value makes the pass cheap.
    _, lse = varlen_cross_attention(
        query, key, value, cu_seqlens, cu_seqlens, longest, longest, scale=scale, return_lse=True
    )
    score = key_importance(query, key, lse, cu_seqlens, cu_seqlens, scale=scale)
    return score / segments.spread(cu_seqlens.diff(), cu_seqlens, key.shape[0], 1).clamp_min(1)


def text_relevance(image: Tensor, text: Tensor, cu_image: Tensor, cu_text: Tensor) -> Tensor:
    """CDPruner's relevance: mean cosine of each image token with the text's tokens, rescaled to [0, 1] per image.

    Where the text says nothing (no tokens, or the same cosine with every image token) every token's relevance is 1, so
    that diversity alone decides. Text tokens that are not finite take no part. An image token that is not finite has
    relevance NaN and changes no other.

    Args:
        image, text: (total_image, channels), (total_text, channels) in one space.
        cu_image, cu_text: (batch + 1,) int32.
    """
    for name, x, other in (("image", image, text), ("text", text, image)):
        check_rows(name, x)
        if x.ndim != 2 or x.shape[1] != other.shape[-1]:
            raise ValueError(
                f"image and text must have shapes (total_image, channels) and (total_text, channels); got "
                f"{tuple(image.shape)} and {tuple(text.shape)}"
            )
    for name, x, offsets in (("cu_image", image, cu_image), ("cu_text", text, cu_text)):
        check_offsets(name, offsets, x.shape[0])
        check_device(name, offsets, "image", image)
    check_device("text", text, "image", image)
    if cu_image.shape != cu_text.shape:
        raise ValueError(
            f"cu_text must have the shape of cu_image, {tuple(cu_image.shape)}; got {tuple(cu_text.shape)}"
        )
    total, batch = image.shape[0], cu_image.shape[0] - 1
    unit_text = segments.unit_rows(text)
    useful = unit_text.isfinite().all(1)
    owner = torch.where(useful, segments.sequence_ids(cu_text, text.shape[0]), batch)
    mean = unit_text.new_zeros(batch + 1, text.shape[1])
    mean = mean.index_add(0, owner, torch.where(useful[:, None], unit_text, 0.0))[:batch]
    mean = mean / segments.segment_count(useful, cu_text).clamp_min(1)[:, None]
    row = segments.sequence_ids(cu_image, total)
    cosine = (segments.unit_rows(image) * torch.nn.functional.pad(mean, (0, 0, 0, 1))[row]).sum(1)
    known = ~cosine.isnan()
    high = segments.segment_max(torch.where(known, cosine, -torch.inf), cu_image)
    low = -segments.segment_max(torch.where(known, -cosine, -torch.inf), cu_image)
    low, wide = segments.spread(low, cu_image, total), segments.spread(high - low, cu_image, total)
    relevance = torch.where(wide > 1e-6, (cosine - low) / wide.clamp_min(1e-6), 1.0)
    return torch.where(known, relevance, torch.nan)


def frame_change(tokens: Tensor, tokens_per_frame: int) -> Tensor:
    """EVS, Bagrov et al. 2025 (arXiv 2510.14624): 1 - cosine to the same patch of the previous frame; (total,) float32.

    A video's first frame scores 2, the largest possible, and so is kept before any other. Two zero tokens (of black
    frames) are the same, change 0; a zero and another token differ, change 1. Where either is not finite the score is
    NaN. ``tokens`` (frames * tokens_per_frame, channels) of one video; for a batch call it per video.
    """
    check_rows("tokens", tokens)
    if not isinstance(tokens_per_frame, int) or isinstance(tokens_per_frame, bool):
        raise TypeError(f"tokens_per_frame must be an int; got {type(tokens_per_frame).__name__}")
    if tokens.ndim != 2:
        raise ValueError(f"tokens must have shape (total, channels); got {tuple(tokens.shape)}")
    if tokens_per_frame < 1 or tokens.shape[0] % tokens_per_frame:
        raise ValueError(f"tokens_per_frame must divide the {tokens.shape[0]} tokens; got {tokens_per_frame}")
    unit = segments.unit_rows(tokens).unflatten(0, (-1, tokens_per_frame))
    change = (1 - (unit[1:] * unit[:-1]).sum(-1)).clamp_min(0.0)
    change = torch.where((unit[1:] == unit[:-1]).all(-1), 0.0, change)
    return torch.cat([change.new_full((min(1, unit.shape[0]), tokens_per_frame), 2.0), change]).flatten()


def frame_counts(tokens: Tensor, cu_frames: Tensor, total: int) -> Tensor:
    """Token counts of a video's frames, more for frames that stand out: VidCom2, Liu et al. 2025 (arXiv 2505.14454).

    A frame's uniqueness is minus the mean cosine of its tokens with the video's mean token; ``total`` tokens are shared
    in proportion to its softmax over frames. Tokens that are not finite take no part. ``cu_frames`` is (frames + 1,)
    int32; returns (frames,) int32 counts to pass to ``select`` as its budget.
    """
    check_rows("tokens", tokens)
    if tokens.ndim != 2:
        raise ValueError(f"tokens must have shape (total, channels); got {tuple(tokens.shape)}")
    check_offsets("cu_frames", cu_frames, tokens.shape[0])
    check_device("cu_frames", cu_frames, "tokens", tokens)
    if not isinstance(total, int) or isinstance(total, bool) or total < 0:
        raise ValueError(f"total must be an int and not negative; got {total!r}")
    unit = segments.unit_rows(tokens)
    useful = unit.isfinite().all(1) & segments.inside(cu_frames, tokens.shape[0])
    unit = torch.where(useful[:, None], unit, 0.0)
    likeness = unit @ torch.nn.functional.normalize(unit.sum(0, keepdim=True), dim=1).squeeze(0)
    # Fixed point: the difference of two running sums is exact.
    sums = segments.segment_count(segments.fixed_point(likeness), cu_frames).double() / 2**segments.FRACTION_BITS
    uniqueness = -(sums / segments.segment_count(useful, cu_frames).clamp_min(1))
    spread = uniqueness.std(unbiased=False).clamp_min(1e-6) if uniqueness.numel() else uniqueness.sum()
    shares = torch.softmax((uniqueness - uniqueness.mean()) / spread, 0)
    return segments.share(total, shares, cu_frames.diff())
