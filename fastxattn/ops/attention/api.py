"""The public functions: cross-attention over packed and over padded tokens."""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from fastxattn.ops.attention import padded
from fastxattn.ops.attention.dispatch import attend


@overload
def varlen_cross_attention(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor,
    max_seqlen_q: int | None = None, max_seqlen_k: int | None = None, *, scale: float | None = None,
    softcap: float = 0.0, kv_range: Tensor | None = None, key_bias: Tensor | None = None,
    key_index: Tensor | None = None, dropout_p: float = 0.0, dropout_seed: int | Tensor | None = None,
    return_lse: Literal[False] = False, backend: str = "auto",
) -> Tensor: ...  # fmt: skip


@overload
def varlen_cross_attention(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor,
    max_seqlen_q: int | None = None, max_seqlen_k: int | None = None, *, scale: float | None = None,
    softcap: float = 0.0, kv_range: Tensor | None = None, key_bias: Tensor | None = None,
    key_index: Tensor | None = None, dropout_p: float = 0.0, dropout_seed: int | Tensor | None = None,
    return_lse: Literal[True], backend: str = "auto",
) -> tuple[Tensor, Tensor]: ...  # fmt: skip


def varlen_cross_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    *,
    scale: float | None = None,
    softcap: float = 0.0,
    kv_range: Tensor | None = None,
    key_bias: Tensor | None = None,
    key_index: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: int | Tensor | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Attention of each sequence's queries over the same sequence's keys, on packed tokens.

    For sequence b, query i, head h, and the keys j of b that i sees::

        s_ij  = softcap * tanh(scale * q_i.k_j / softcap) + key_bias_j        (no tanh when softcap is 0)
        lse_i = log sum_j exp(s_ij)
        out_i = sum_j exp(s_ij - lse_i) v_j

    Args:
        query: (total_q, heads, head_dim) float32, bfloat16, float16 or float64.
        key: (total_k, kv_heads, head_dim); kv_heads divides heads, each serves heads / kv_heads neighbours.
        value: (total_k, kv_heads, value_dim).
        cu_seqlens_q: (batch + 1,) int32; queries of sequence b are rows ``cu_seqlens_q[b]`` up to ``[b + 1]``. Rows
            beyond the last offset are not touched; their output is 0.
        cu_seqlens_k: (batch + 1,) int32, the same for keys, or for ``key_index`` when given.
        max_seqlen_q: taken so that flash-attention's call sites work unchanged; no backend needs it.
        max_seqlen_k: the same.
        scale: multiplies the scores; 1 / sqrt(head_dim) when None.
        softcap: Gemma 2's soft limit on scores; 0 is off.
        kv_range: (total_q, 2) int32; query i sees keys [start, end) of its own sequence, 0 <= start <= end <= its keys;
            none when start == end. For causal, windowed, media and time-aligned attention see
            :mod:`fastxattn.ops.attention.ranges`.
        key_bias: (total_k,) or (total_k, heads) float32, added to the scores of a key (the log of a merged token's
            size: Bolya et al., Token Merging, 2022). Gets its gradient.
        key_index: (kept,) int32; the keys are rows ``key_index`` of key and value, read in place, and
            ``cu_seqlens_k`` and ``kv_range`` count its entries. Gradients land on the selected rows.
        dropout_p: probability of dropping an attention weight, in [0, 1). The others are scaled by 1 / (1 - p).
        dropout_seed: int or (1,) int64 tensor; the mask is a function of it, the same on every backend. None draws
            one from torch's generator.
        return_lse: also return lse.
        backend: ``"auto"``, or a name that is used or refused.

    Returns:
        out (total_q, heads, value_dim) in the dtype of query (the autocast dtype under autocast), and with
        ``return_lse`` lse (heads, total_q) float32 (float64 for float64 input), differentiable too. A query that sees
        no key gets 0 and -inf, and zero gradients.

    Raises:
        TypeError: an argument is not a tensor or has the wrong dtype.
        ValueError: a shape, device, offset, index, range or number is wrong, or there is no such backend.
        RuntimeError: the backend asked for cannot run this problem; the message says why.

    Example:
        >>> text, image = PackedTokens.from_list(texts), PackedTokens.from_list(images)
        >>> out = varlen_cross_attention(q, k, v, text.cu_seqlens, image.cu_seqlens)

    Vaswani et al., Attention is all you need (2017); Dao et al., FlashAttention (2022); Milakov and Gimelshein,
    Online normalizer calculation for softmax (2018).
    """
    out, lse = attend(
        query, key, value, cu_seqlens_q, cu_seqlens_k, None, None, None, key_index, kv_range, key_bias, None,
        scale, softcap, dropout_p, dropout_seed, backend,
    )  # fmt: skip
    return (out, _narrow(lse, query)) if return_lse else out


@overload
def cross_attention(
    query: Tensor, key: Tensor, value: Tensor, *, query_mask: Tensor | None = None, key_mask: Tensor | None = None,
    kv_range: Tensor | None = None, bias: Tensor | None = None, key_bias: Tensor | None = None,
    scale: float | None = None, softcap: float = 0.0, dropout_p: float = 0.0,
    dropout_seed: int | Tensor | None = None, return_lse: Literal[False] = False, backend: str = "auto",
) -> Tensor: ...  # fmt: skip


@overload
def cross_attention(
    query: Tensor, key: Tensor, value: Tensor, *, query_mask: Tensor | None = None, key_mask: Tensor | None = None,
    kv_range: Tensor | None = None, bias: Tensor | None = None, key_bias: Tensor | None = None,
    scale: float | None = None, softcap: float = 0.0, dropout_p: float = 0.0,
    dropout_seed: int | Tensor | None = None, return_lse: Literal[True], backend: str = "auto",
) -> tuple[Tensor, Tensor]: ...  # fmt: skip


def cross_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    query_mask: Tensor | None = None,
    key_mask: Tensor | None = None,
    kv_range: Tensor | None = None,
    bias: Tensor | None = None,
    key_bias: Tensor | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
    dropout_p: float = 0.0,
    dropout_seed: int | Tensor | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention on padded batches; absent tokens cost nothing and are not copied away.

    The same function as :func:`varlen_cross_attention` in another layout: masks become the rows that the kernel
    reads and writes in place.

    Args:
        query: (batch, Lq, heads, head_dim). As in the packed form; (batch, Lq) must merge into one axis of rows, or
            the tensor is copied once.
        key: (batch, Lk, kv_heads, head_dim).
        value: (batch, Lk, kv_heads, value_dim).
        query_mask: (batch, Lq) boolean, True where there is a token; any pattern. None: everywhere.
        key_mask: (batch, Lk) boolean.
        kv_range: (batch, Lq, 2) int32, or (1, Lq, 2) or (Lq, 2) for all; query i sees key positions [start, end) of
            the padded axis, less those that are absent; 0 <= start <= end <= Lk.
        bias: broadcasts to (batch, heads, Lq, Lk); float32 or the dtype of query; added to the scores. Gets its
            gradient, summed over broadcast axes. -inf hides a key's weight; prefer masks and ranges, which skip work.
        key_bias: (batch, Lk) or (batch, Lk, heads) float32, added to the scores of a key.
        scale: as in the packed form, like all that follow.
        softcap: the same.
        dropout_p: the same.
        dropout_seed: the same.
        return_lse: also return lse.
        backend: the same.

    Returns:
        out (batch, Lq, heads, value_dim), 0 where ``query_mask`` is False; with ``return_lse`` also lse
        (batch, heads, Lq), -inf there.

    Raises:
        TypeError: an argument is not a tensor or has the wrong dtype.
        ValueError: a shape, device or number is wrong, or there is no such backend.
        RuntimeError: the backend asked for cannot run this problem; the message says why.
    """
    layout = padded.Layout.of(query, key, value, query_mask, key_mask)
    out, lse = attend(
        layout.query, layout.key, layout.value, layout.cu_seqlens_q, layout.cu_seqlens_k, layout.seqused_q,
        layout.seqused_k, layout.query_index, layout.key_index, layout.ranges(kv_range), layout.per_key(key_bias),
        padded.four_axes(bias, layout), scale, softcap, dropout_p, dropout_seed, backend,
    )  # fmt: skip
    out = out.unflatten(0, query.shape[:2])
    return (out, _narrow(lse, query).unflatten(1, query.shape[:2]).transpose(0, 1)) if return_lse else out


def _narrow(lse: Tensor, query: Tensor) -> Tensor:
    """Lse as users get it: kernels may hand it to their backward pass with more digits."""
    return lse if query.dtype == torch.float64 else lse.float()
