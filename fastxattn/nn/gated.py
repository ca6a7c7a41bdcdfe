"""GatedCrossAttentionBlock: tanh-gated cross-attention of Flamingo and IDEFICS to the images before a token."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from fastxattn.nn.packing import Tokens, pack
from fastxattn.nn.projected import Absorb, ContextKV, KeyValueWeights, attend, cross_attend
from fastxattn.packed import PackedTokens


class RMSNorm(nn.Module):
    """``x / sqrt(mean(x^2) + eps) * weight``, the mean in float32, as in IDEFICS."""

    def __init__(self, width: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """Normalise (..., width) over the last axis."""
        scaled = states * torch.rsqrt(states.float().pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * scaled.to(self.weight.dtype)


class _CrossAttention(nn.Module):
    def __init__(self, hidden: int, heads: int, context: int, qk_norm: bool, eps: float) -> None:
        super().__init__()
        self.q_proj = nn.Linear(hidden, hidden, bias=False)
        self.k_proj = nn.Linear(context, hidden, bias=False)
        self.v_proj = nn.Linear(context, hidden, bias=False)
        self.o_proj = nn.Linear(hidden, hidden, bias=False)
        if qk_norm:
            self.q_layer_norm = RMSNorm(hidden // heads, eps)
            self.k_layer_norm = RMSNorm(hidden // heads, eps)


class _GatedMLP(nn.Module):
    def __init__(self, hidden: int, inner: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden, inner, bias=False)
        self.up_proj = nn.Linear(hidden, inner, bias=False)
        self.down_proj = nn.Linear(inner, hidden, bias=False)


class GatedCrossAttentionBlock(nn.Module):
    """Language-model layer with cross-attention to images through a gate that starts closed.

    ::

        x = x + tanh(alpha_cross_attn) * attention(norm(x), images)     0 for tokens that see no image
        x = x + tanh(alpha_dense) * mlp(norm(x))

    Which images a token sees is ``kv_range``: :func:`fastxattn.ranges.media_kv_range` makes it from media locations,
    and keys outside of all ranges cost nothing. Parameters and ``state_dict`` of Hugging Face's
    ``IdeficsGatedCrossAttentionLayer``.

    Args:
        hidden_size: width of the text.
        num_heads: heads.
        intermediate_size: width inside the gated MLP.
        context_width: width of the image features; default ``hidden_size``.
        qk_norm: normalise queries and keys per head (then key projections cannot be absorbed).
        vector_gate: one gate per feature instead of one for all.
        eps: of the norms.
        dropout: on the two branches, in training.
        attention_dropout: on attention weights, in training.
        activation: of the gated MLP.
        absorb: "auto", "on" or "off"; see :class:`fastxattn.nn.MultiheadCrossAttention`.

    Source: Alayrac et al., "Flamingo: a visual language model for few-shot learning", 2022.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        intermediate_size: int,
        context_width: int | None = None,
        *,
        qk_norm: bool = False,
        vector_gate: bool = False,
        eps: float = 1e-6,
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        activation: Any = F.silu,
        absorb: Absorb = "auto",
    ) -> None:
        if hidden_size % num_heads:
            raise ValueError(f"num_heads must divide hidden_size; got {num_heads} and {hidden_size}")
        super().__init__()
        self.num_heads, self.qk_norm, self.activation, self.absorb = num_heads, qk_norm, activation, absorb
        self.dropout, self.attention_dropout = dropout, attention_dropout
        context = hidden_size if context_width is None else context_width
        self.cross_attn = _CrossAttention(hidden_size, num_heads, context, qk_norm, eps)
        self.mlp = _GatedMLP(hidden_size, intermediate_size)
        self.input_layernorm = RMSNorm(hidden_size, eps)
        self.post_attention_layernorm = RMSNorm(hidden_size, eps)
        shape = (1, 1, hidden_size) if vector_gate else (1,)
        self.alpha_cross_attn = nn.Parameter(torch.zeros(shape))
        self.alpha_dense = nn.Parameter(torch.zeros(shape))

    @classmethod
    def from_hf(cls, layer: Any, absorb: Absorb = "auto") -> GatedCrossAttentionBlock:
        """A block that shares the parameters of an ``IdeficsGatedCrossAttentionLayer``."""
        inner = layer.cross_attn
        with torch.device("meta"):
            new = cls(
                layer.hidden_size,
                inner.num_heads,
                layer.mlp.gate_proj.out_features,
                inner.k_proj.in_features,
                qk_norm=inner.qk_layer_norms,
                vector_gate=layer.alpha_dense.ndim == 3,
                eps=layer.input_layernorm.variance_epsilon,
                dropout=layer.config,  # the class keeps its dropout under this name
                attention_dropout=inner.dropout,
                activation=layer.mlp.act_fn,
                absorb=absorb,
            )
        names = set(new.state_dict())
        state = layer.state_dict(keep_vars=True)
        new.load_state_dict({k: v for k, v in state.items() if k in names}, assign=True)  # less rotary buffers
        return new.train(layer.training)

    def _project(self, context: PackedTokens) -> ContextKV:
        inner = self.cross_attn
        kv = KeyValueWeights.of(inner.k_proj, inner.v_proj).project(context, self.num_heads)
        if not self.qk_norm:
            return kv
        return ContextKV(inner.k_layer_norm(kv.key), kv.value, kv.cu_seqlens, kv.max_seqlen)

    def precompute_kv(self, context: Tokens, *, context_mask: torch.Tensor | None = None) -> ContextKV:
        """Keys and values of the images, for ``context_kv=`` in every later decoding step."""
        return self._project(pack(context, context_mask, name="context")[0])

    def forward(
        self,
        hidden: Tokens,
        context: Tokens | None = None,
        *,
        hidden_mask: torch.Tensor | None = None,
        context_mask: torch.Tensor | None = None,
        kv_range: torch.Tensor | None = None,
        context_kv: ContextKV | None = None,
    ) -> Tokens:
        """Apply both branches.

        Args:
            hidden: text states (batch, length, hidden_size) or PackedTokens.
            context: image features (batch, tokens, context_width) or PackedTokens.
            hidden_mask: (batch, length) boolean, True = valid token.
            context_mask: (batch, tokens) boolean.
            kv_range: (batch, length, 2) int32 for padded text, (total, 2) for packed: the context tokens each text
                token sees; None: all.
            context_kv: result of :meth:`precompute_kv`, instead of ``context``.

        Returns:
            As ``hidden``.
        """
        if (context is None) == (context_kv is None):
            raise ValueError("give either context or context_kv")
        packed, layout = pack(hidden, hidden_mask, name="hidden")
        ranges = None if kv_range is None else layout.pack_rows(kv_range)
        inner, states = self.cross_attn, packed.values
        query = inner.q_proj(self.input_layernorm(states)).unflatten(-1, (self.num_heads, -1))
        query = inner.q_layer_norm(query) if self.qk_norm else query
        dropped = self.attention_dropout if self.training else 0.0
        if context is not None and not self.qk_norm:
            features, _ = pack(context, context_mask, name="context")
            weights = KeyValueWeights.of(inner.k_proj, inner.v_proj)
            out = cross_attend(query, packed, features, weights, absorb=self.absorb, kv_range=ranges, dropout_p=dropped)
        else:
            kv = context_kv
            if context is not None:
                kv = self.precompute_kv(context, context_mask=context_mask)
            assert kv is not None
            out = attend(query, packed, kv, kv_range=ranges, dropout_p=dropped)
        # No bias anywhere: a token that sees no image gets exactly 0 from this branch.
        out = F.dropout(inner.o_proj(out), self.dropout, self.training)
        states = states + torch.tanh(self.alpha_cross_attn).flatten() * out
        normed = self.post_attention_layernorm(states)
        mlp = self.mlp.down_proj(self.activation(self.mlp.gate_proj(normed)) * self.mlp.up_proj(normed))
        states = states + torch.tanh(self.alpha_dense).flatten() * F.dropout(mlp, self.dropout, self.training)
        return layout.restore(states)
