"""Attentional poolers: CoCa's, and SigLIP's head."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from fastxattn.nn.multihead import MultiheadCrossAttention
from fastxattn.nn.packing import Tokens, pack
from fastxattn.nn.projected import Absorb


def _pool(attention: MultiheadCrossAttention, probes: torch.Tensor, context: Tokens) -> torch.Tensor:
    """``probes`` (count, width), the same for every sequence, over packed ``context``: (batch, count, width)."""
    packed, _ = pack(context, name="context")
    out = attention(probes.expand(packed.batch_size, -1, -1), packed)
    assert isinstance(out, torch.Tensor)
    return out


class AttentionalPooler(nn.Module):
    """CoCa's pooler: learned queries over the normalised features.

    ``out = attention(ln_q(query), ln_k(x), ln_k(x))``. Parameters and ``state_dict`` of open_clip's
    ``AttentionalPooler``. A single query over wide features makes absorption worth nearly all of the projections.

    Source: Yu et al., "CoCa: contrastive captioners are image-text foundation models", 2022.
    """

    def __init__(
        self, embed_dim: int, context_dim: int, num_heads: int = 8, queries: int = 256, absorb: Absorb = "auto"
    ) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.randn(queries, embed_dim))
        self.attn = MultiheadCrossAttention(embed_dim, num_heads, kdim=context_dim, vdim=context_dim, absorb=absorb)
        self.ln_q = nn.LayerNorm(embed_dim)
        self.ln_k = nn.LayerNorm(context_dim)

    def forward(self, context: Tokens, *, context_mask: torch.Tensor | None = None) -> torch.Tensor:
        """Pool (batch, length, context_dim) or PackedTokens to (batch, queries, embed_dim)."""
        packed, _ = pack(context, context_mask, name="context")
        return _pool(self.attn, self.ln_q(self.query), packed.with_values(self.ln_k(packed.values)))


class _MLP(nn.Module):
    def __init__(self, width: int, inner: int, activation: Any) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, inner)
        self.fc2 = nn.Linear(inner, width)
        self.activation = activation


def _gelu_tanh(states: torch.Tensor) -> torch.Tensor:
    return F.gelu(states, approximate="tanh")


class SiglipPooler(nn.Module):
    """SigLIP's head: one learned probe over the patches, then a residual MLP.

    Parameters and ``state_dict`` of Hugging Face's ``SiglipMultiheadAttentionPoolingHead``.

    Source: Zhai et al., "Sigmoid loss for language image pre-training", 2023.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        intermediate_size: int,
        *,
        eps: float = 1e-6,
        activation: Any = _gelu_tanh,
        absorb: Absorb = "auto",
    ) -> None:
        super().__init__()
        self.probe = nn.Parameter(torch.randn(1, 1, hidden_size))
        self.attention = MultiheadCrossAttention(hidden_size, num_heads, absorb=absorb)
        self.layernorm = nn.LayerNorm(hidden_size, eps=eps)
        self.mlp = _MLP(hidden_size, intermediate_size, activation)

    @classmethod
    def from_hf(cls, module: Any, absorb: Absorb = "auto") -> SiglipPooler:
        """A head that shares the parameters of a ``SiglipMultiheadAttentionPoolingHead``."""
        with torch.device("meta"):
            new = cls(
                module.probe.shape[-1],
                module.attention.num_heads,
                module.mlp.fc1.out_features,
                eps=module.layernorm.eps,
                activation=module.mlp.activation_fn,
                absorb=absorb,
            )
        new.load_state_dict(module.state_dict(keep_vars=True), assign=True)
        return new.train(module.training)

    def forward(self, context: Tokens, *, context_mask: torch.Tensor | None = None) -> torch.Tensor:
        """Pool (batch, length, hidden_size) or PackedTokens to (batch, hidden_size)."""
        packed, _ = pack(context, context_mask, name="context")
        pooled = _pool(self.attention, self.probe[0], packed)[:, 0]
        mlp = self.mlp
        return pooled + mlp.fc2(mlp.activation(mlp.fc1(self.layernorm(pooled))))
