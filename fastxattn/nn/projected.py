"""Cross-attention from tokens to projected features, shared by all modules: project, or absorb the projections.

With key = x W_k^T + b_k and value = x W_v^T + b_v there are two exact ways to attend:

* **project**: compute key and value for every context token, then attend. Costs 4 total_k d_in heads head_dim.
* **absorb**: q (W_k x) = (W_k^T q) x, so fold W_k into the query and W_v into the result, and attend over the raw
  features as one shared head (:func:`fastxattn.absorbed_attention`). The key bias adds the same number to all scores
  of a query and cancels; the value bias adds to the output, because the weights sum to one.

:func:`fastxattn.ops.absorbed_attention.cost.choose` picks by counted work.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F

from fastxattn.nn.packing import check_same_batch
from fastxattn.ops.absorbed_attention import absorbed_attention
from fastxattn.ops.absorbed_attention.cost import choose
from fastxattn.ops.attention import varlen_cross_attention
from fastxattn.packed import PackedTokens
from fastxattn.runtime.autocast import autocast_dtype
from fastxattn.runtime.backend import note

Absorb = Literal["auto", "on", "off"]


@dataclass(frozen=True)
class ContextKV:
    """Projected context: compute it once, attend to it many times."""

    key: torch.Tensor
    """(total_k, heads, head_dim)"""
    value: torch.Tensor
    """(total_k, heads, value_dim)"""
    cu_seqlens: torch.Tensor
    """(batch + 1,) int32"""
    max_seqlen: int


@dataclass(frozen=True)
class KeyValueWeights:
    """The projections of one attention's context."""

    key_weight: torch.Tensor
    """(heads * head_dim, width of the features)"""
    value_weight: torch.Tensor
    """(heads * value_dim, width of the features)"""
    key_bias: torch.Tensor | None = None
    value_bias: torch.Tensor | None = None

    @staticmethod
    def of(key: torch.nn.Linear, value: torch.nn.Linear) -> KeyValueWeights:
        """The weights of two linear layers."""
        return KeyValueWeights(key.weight, value.weight, key.bias, value.bias)

    def project(self, context: PackedTokens, heads: int, value: PackedTokens | None = None) -> ContextKV:
        """Keys of ``context``'s rows, and values of ``value``'s (default: of the same rows)."""
        source = context.values if value is None else value.values
        key = F.linear(context.values, self.key_weight, self.key_bias)
        values = F.linear(source, self.value_weight, self.value_bias)
        return ContextKV(
            key.unflatten(-1, (heads, -1)), values.unflatten(-1, (heads, -1)), context.cu_seqlens, context.max_seqlen
        )


def attend(
    query: torch.Tensor,
    layout: PackedTokens,
    kv: ContextKV,
    *,
    kv_range: torch.Tensor | None = None,
    key_bias: torch.Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
) -> torch.Tensor:
    """Attention of ``query`` (total_q, heads, head_dim), whose offsets ``layout`` has, over ``kv``.

    Returns (total_q, heads * value_dim).
    """
    out = varlen_cross_attention(
        query,
        kv.key,
        kv.value,
        layout.cu_seqlens,
        kv.cu_seqlens,
        layout.max_seqlen,
        kv.max_seqlen,
        scale=scale,
        kv_range=kv_range,
        key_bias=key_bias,
        dropout_p=dropout_p,
    )
    return out.flatten(1)


def attend_features(
    query: torch.Tensor,
    layout: PackedTokens,
    context: PackedTokens,
    weights: KeyValueWeights,
    *,
    kv_range: torch.Tensor | None = None,
    key_bias: torch.Tensor | None = None,
    scale: float | None = None,
) -> torch.Tensor:
    """Project ``context`` and :func:`attend`, computed with both projections absorbed."""
    heads, head_dim = query.shape[1:]
    key_weight = weights.key_weight.unflatten(0, (heads, head_dim))
    value_weight = weights.value_weight.unflatten(0, (heads, -1))
    query = query.to(autocast_dtype(query.device) or query.dtype)
    key_weight, value_weight = key_weight.to(query.dtype), value_weight.to(query.dtype)
    absorbed = torch.bmm(query.transpose(0, 1), key_weight).transpose(0, 1)  # (total_q, heads, d_in)
    mixed, lse = absorbed_attention(
        absorbed,
        context.values.to(query.dtype),
        layout.cu_seqlens,
        context.cu_seqlens,
        layout.max_seqlen,
        context.max_seqlen,
        scale=head_dim**-0.5 if scale is None else scale,
        kv_range=kv_range,
        key_bias=key_bias,
        return_lse=True,
    )
    out = torch.bmm(mixed.transpose(0, 1), value_weight.transpose(1, 2)).transpose(0, 1)
    if weights.value_bias is not None:
        # A row that sees no key has no weights that sum to one: it stays 0.
        seen = (lse.detach() != -torch.inf).transpose(0, 1).unsqueeze(-1)
        out = out + weights.value_bias.to(out.dtype).unflatten(0, (heads, -1)) * seen
    if weights.key_bias is not None and weights.key_bias.requires_grad and torch.is_grad_enabled():
        # The key bias cancels; its zero gradient is explicit because optimizers and DDP expect one of every parameter.
        out = out + 0.0 * weights.key_bias.sum()
    return out.flatten(1)


def cross_attend(
    query: torch.Tensor,
    layout: PackedTokens,
    context: PackedTokens,
    weights: KeyValueWeights,
    *,
    value: PackedTokens | None = None,
    absorb: Absorb = "auto",
    kv_range: torch.Tensor | None = None,
    key_bias: torch.Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
) -> torch.Tensor:
    """Compute attention of projected queries over raw features, projecting or absorbing by cost.

    Args:
        query: (total_q, heads, head_dim), projected.
        layout: any PackedTokens with the queries' offsets.
        context: raw features (total_k, d_in).
        weights: the key and value projections.
        value: features that the values are made of, when not ``context``'s (then nothing can be absorbed).
        absorb: "auto" counts the work; "on" and "off" force.
        kv_range: (total_q, 2) int32, as in :func:`fastxattn.varlen_cross_attention`.
        key_bias: (total_k,) or (total_k, heads), added to the scores.
        scale: of the scores; default head_dim ** -0.5.
        dropout_p: dropout on the attention weights (then nothing is absorbed).

    Returns:
        (total_q, heads * value_dim), before any output projection.
    """
    check_same_batch(layout, context)
    heads, head_dim = query.shape[1:]
    dtype = autocast_dtype(query.device) or context.values.dtype  # of the projected context
    possible = value is None and dropout_p == 0.0 and query.dtype == dtype
    if absorb == "on" and not possible:
        raise ValueError("absorb='on' needs key and value from the same features, one dtype, and no dropout")
    if absorb == "auto":
        choice = choose(
            query.shape[0],
            context.values.shape[0],
            layout.cu_seqlens.numel() - 1,
            heads,
            head_dim,
            context.values.shape[1],
            query.dtype,
            query.device.type,
            backward=torch.is_grad_enabled() and (query.requires_grad or weights.key_weight.requires_grad),
            context_grad=context.values.requires_grad,
        )
        note(choice)
        possible = possible and choice.absorb
    if absorb != "off" and possible:
        return attend_features(query, layout, context, weights, kv_range=kv_range, key_bias=key_bias, scale=scale)
    kv = weights.project(context, heads, value)
    return attend(query, layout, kv, kv_range=kv_range, key_bias=key_bias, scale=scale, dropout_p=dropout_p)
