"""The public functions: cross-attention over packed and over padded tokens."""

from __future__ import annotations

from typing import Literal, TypedDict, overload

import torch
from torch import Tensor
from typing_extensions import Unpack

from fastxattn.ops.arguments import default_scale
from fastxattn.ops.attention.backends import run, seed_tensor
from fastxattn.ops.attention.padded import Layout
from fastxattn.ops.attention.problem import Problem
from fastxattn.ops.checks import check_tensor
from fastxattn.ranges import check_count, sliding_window_kv_range

Window = int | tuple[int, int] | None


class _Options(TypedDict, total=False):
    """Keyword options that both functions have."""

    scale: float | None
    softcap: float
    causal: bool
    window: Window
    kv_range: Tensor | None
    key_bias: Tensor | None
    dropout_p: float
    dropout_seed: int | Tensor | None
    backend: str


class _Packed(_Options, total=False):
    key_index: Tensor | None


class _Padded(_Options, total=False):
    query_mask: Tensor | None
    key_mask: Tensor | None
    bias: Tensor | None


@overload
def varlen_cross_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    *,
    return_lse: Literal[False] = False,
    **options: Unpack[_Packed],
) -> Tensor: ...


@overload
def varlen_cross_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    *,
    return_lse: Literal[True],
    **options: Unpack[_Packed],
) -> tuple[Tensor, Tensor]: ...


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
    causal: bool = False,
    window: Window = None,
    kv_range: Tensor | None = None,
    key_bias: Tensor | None = None,
    key_index: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: int | Tensor | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Compute attention of each sequence's queries over the same sequence's keys, on packed tokens.

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
        max_seqlen_q: Ignored; accepted for compatibility with flash-attn.
        max_seqlen_k: Ignored, too.
        scale: multiplies the scores; 1 / sqrt(head_dim) when None.
        softcap: Gemma 2's soft limit on scores; 0 is off.
        causal: a query sees no key after its own place. The last query of a sequence has the place of its last key, as
            in flash-attn (aligned at the bottom right where lengths differ); see
            :func:`fastxattn.ranges.causal_kv_range`, which makes the ``kv_range``.
        window: (left, right), how many keys a query sees before and after its own place, which is that of ``causal``;
            -1 is no limit, and one int stands for both sides. With ``causal`` none after it. See
            :func:`fastxattn.ranges.sliding_window_kv_range`.
        kv_range: (total_q, 2) int32; query i sees keys [start, end) of its own sequence, 0 <= start <= end <= its keys;
            none when start == end. For media and time-aligned attention see :mod:`fastxattn.ranges`. Excludes
            ``causal`` and ``window``.
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
        ValueError: a shape, device, offset, index, range or number is wrong, or there is no such backend; ``kv_range``
            beside ``causal`` or ``window``.
        RuntimeError: the backend asked for cannot run this problem; the message says why.

    Example:
        >>> text, image = PackedTokens.from_list(texts), PackedTokens.from_list(images)
        >>> out = varlen_cross_attention(q, k, v, text.cu_seqlens, image.cu_seqlens)

    Vaswani et al., Attention is all you need (2017); Dao et al., FlashAttention (2022); Milakov and Gimelshein,
    Online normalizer calculation for softmax (2018).
    """
    if causal is not False or window is not None:
        left, right = _limits(causal, window, kv_range)
        check_tensor("query", query)
        kv_range = sliding_window_kv_range(cu_seqlens_q, cu_seqlens_k, left, right, query.shape[0])
    problem = Problem(
        query=query,
        key=key,
        value=value,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        key_index=key_index,
        kv_range=kv_range,
        key_bias=key_bias,
        scale=default_scale(query, scale),
        softcap=softcap,
        dropout_p=dropout_p,
        dropout_seed=_seed(dropout_seed, query) if dropout_p else None,
    )
    out, lse = run(problem, backend)
    return (out, _narrow(lse, query)) if return_lse else out


@overload
def cross_attention(
    query: Tensor, key: Tensor, value: Tensor, *, return_lse: Literal[False] = False, **options: Unpack[_Padded]
) -> Tensor: ...


@overload
def cross_attention(
    query: Tensor, key: Tensor, value: Tensor, *, return_lse: Literal[True], **options: Unpack[_Padded]
) -> tuple[Tensor, Tensor]: ...


def cross_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    query_mask: Tensor | None = None,
    key_mask: Tensor | None = None,
    causal: bool = False,
    window: Window = None,
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
    """Compute attention on padded batches; padding costs no work and tokens are not copied.

    The same function as :func:`varlen_cross_attention` in another layout: masks become the rows that the kernel
    reads and writes in place.

    Args:
        query: (batch, Lq, heads, head_dim). As in the packed form; (batch, Lq) must merge into one axis of rows, or
            the tensor is copied once.
        key: (batch, Lk, kv_heads, head_dim).
        value: (batch, Lk, kv_heads, value_dim).
        query_mask: (batch, Lq) boolean, True where there is a token; any pattern. None: everywhere.
        key_mask: (batch, Lk) boolean.
        causal: a query sees no key after its own place in the padded axis, where query Lq - 1 has the place of key
            Lk - 1, whatever the masks hide. For left-padded batches, and where Lq is Lk, that is the order of the
            tokens themselves.
        window: (left, right), or one int for both: how many positions of the padded key axis a query sees before and
            after its own place; -1 is no limit.
        kv_range: (batch, Lq, 2) int32, or (1, Lq, 2) or (Lq, 2) for all; query i sees key positions [start, end) of
            the padded axis, less padding; 0 <= start <= end <= Lk. Excludes ``causal`` and ``window``.
        bias: broadcasts to (batch, heads, Lq, Lk); float32 or the dtype of query; added to the scores. Gets its
            gradient, summed over broadcast axes. -inf hides a key's weight; prefer masks and ranges, which skip work.
        key_bias: (batch, Lk) or (batch, Lk, heads) float32, added to the scores of a key.
        scale: multiplies the scores; 1 / sqrt(head_dim) when None.
        softcap: as in the packed form, like all that follow.
        dropout_p: the same.
        dropout_seed: the same.
        return_lse: also return lse.
        backend: the same.

    Returns:
        out (batch, Lq, heads, value_dim), 0 where ``query_mask`` is False; with ``return_lse`` also lse
        (batch, heads, Lq), -inf there.

    Raises:
        TypeError: an argument is not a tensor or has the wrong dtype.
        ValueError: a shape, device or number is wrong, or there is no such backend; ``kv_range`` beside ``causal`` or
            ``window``.
        RuntimeError: the backend asked for cannot run this problem; the message says why.
    """
    layout = Layout.of(query, key, value, query_mask, key_mask)
    if causal is not False or window is not None:
        left, right = _limits(causal, window, kv_range)
        one = torch.arange(2, dtype=torch.int32, device=query.device)  # offsets of one sequence
        offsets = one * layout.length_q, one * layout.length_k
        kv_range = sliding_window_kv_range(*offsets, left, right, layout.length_q)
    problem = Problem(
        **layout.tokens,
        kv_range=layout.ranges(kv_range),
        key_bias=layout.per_key(key_bias),
        bias=layout.four_axes(bias),
        scale=default_scale(query, scale),
        softcap=softcap,
        dropout_p=dropout_p,
        dropout_seed=_seed(dropout_seed, query) if dropout_p else None,
    )
    out, lse = run(problem, backend)
    out = out.unflatten(0, query.shape[:2])
    return (out, _narrow(lse, query).unflatten(1, query.shape[:2]).transpose(0, 1)) if return_lse else out


def _limits(causal: bool, window: Window, kv_range: Tensor | None) -> tuple[int, int]:
    """How many keys a query sees before and after its own place; -1: no limit."""
    if not isinstance(causal, bool):
        raise TypeError(f"causal must be a bool; got {type(causal).__name__}")
    if kv_range is not None:
        name = "causal" if causal else "window"
        raise ValueError(f"kv_range must be None beside {name}, which makes one; put both limits into kv_range")
    if window is None:
        window = (-1, -1)
    elif isinstance(window, int) and not isinstance(window, bool):
        window = (window, window)
    if not isinstance(window, tuple | list) or len(window) != 2:
        raise TypeError(f"window must be an int or (left, right); got {window!r}")
    left, right = window
    for name, limit in (("left", left), ("right", right)):
        check_count(f"{name} of window", limit, -1)
    return left, 0 if causal else right


def _seed(seed: int | Tensor | None, query: Tensor) -> Tensor | None:
    return seed_tensor(seed, query.device) if isinstance(query, Tensor) else None  # type: ignore[no-any-return]


def _narrow(lse: Tensor, query: Tensor) -> Tensor:
    """Lse as the public functions return it: kernels may pass it to their backward pass with more digits."""
    return lse if query.dtype == torch.float64 else lse.float()
