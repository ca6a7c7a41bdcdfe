"""MultiheadCrossAttention: the parameters of torch.nn.MultiheadAttention, the work of its valid tokens only."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastxattn.nn.packing import Tokens, pack
from fastxattn.nn.projected import Absorb, ContextKV, KeyValueWeights, attend, cross_attend


class MultiheadCrossAttention(nn.Module):
    """Multi-head attention of one token set over another, padded or packed, at the cost of the valid tokens.

    ::

        head_h = softmax(scale (query W_q,h^T) (context W_k,h^T)^T) (value W_v,h^T),   out = concat(head) W_o^T + b_o

    Parameters and ``state_dict`` are those of :class:`torch.nn.MultiheadAttention` (with ``batch_first=True``), so
    either loads the other's weights. With few queries per sequence the key and value projections are absorbed (see
    ``absorb``). A query that sees no key gets the output projection's bias (torch gives NaN).

    Args:
        embed_dim: width of the queries and of the output.
        num_heads: heads; divides ``embed_dim``.
        dropout: on the attention weights, in training.
        bias: biases of all four projections.
        kdim: width of the context, default ``embed_dim``.
        vdim: width of the values' features, default ``embed_dim``.
        absorb: attend over raw features with the projections folded into query and output: "auto" (by counted
            work), "on", "off". Exact either way.

    Source: Vaswani et al., "Attention is all you need", 2017.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        kdim: int | None = None,
        vdim: int | None = None,
        absorb: Absorb = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if embed_dim <= 0 or num_heads <= 0 or embed_dim % num_heads:
            raise ValueError(f"num_heads must divide embed_dim; got {num_heads} and {embed_dim}")
        super().__init__()
        self.embed_dim, self.num_heads, self.dropout, self.absorb = embed_dim, num_heads, dropout, absorb
        self.kdim = embed_dim if kdim is None else kdim
        self.vdim = embed_dim if vdim is None else vdim
        self.head_dim = embed_dim // num_heads
        self._qkv_same_embed_dim = self.kdim == embed_dim and self.vdim == embed_dim

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(*shape, device=device, dtype=dtype))

        # Every name exists on every instance, as in torch, so that state_dict keys and their order are torch's.
        if self._qkv_same_embed_dim:
            self.in_proj_weight: nn.Parameter | None = parameter(3 * embed_dim, embed_dim)
            for name in ("q_proj_weight", "k_proj_weight", "v_proj_weight"):
                self.register_parameter(name, None)
        else:
            self.q_proj_weight = parameter(embed_dim, embed_dim)
            self.k_proj_weight = parameter(embed_dim, self.kdim)
            self.v_proj_weight = parameter(embed_dim, self.vdim)
            self.register_parameter("in_proj_weight", None)
        self.in_proj_bias = parameter(3 * embed_dim) if bias else None
        self.out_proj = nn.Linear(embed_dim, embed_dim, bias=bias, device=device, dtype=dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise as torch.nn.MultiheadAttention does."""
        for weight in (self.in_proj_weight, self.q_proj_weight, self.k_proj_weight, self.v_proj_weight):
            if weight is not None:
                nn.init.xavier_uniform_(weight)
        if self.in_proj_bias is not None:
            nn.init.zeros_(self.in_proj_bias)
            nn.init.zeros_(self.out_proj.bias)

    @classmethod
    def from_torch(cls, module: nn.MultiheadAttention, absorb: Absorb = "auto") -> MultiheadCrossAttention:
        """A module that shares ``module``'s parameters.

        Raises:
            ValueError: ``module`` uses ``add_bias_kv`` or ``add_zero_attn``.
        """
        if module.bias_k is not None or module.add_zero_attn:
            raise ValueError("module must not use add_bias_kv or add_zero_attn")
        new = cls(
            module.embed_dim,
            module.num_heads,
            module.dropout,
            module.in_proj_bias is not None,
            module.kdim,
            module.vdim,
            absorb,
            device="meta",
        )
        for name in ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight", "in_proj_bias"):
            setattr(new, name, getattr(module, name))
        new.out_proj = module.out_proj
        return new.train(module.training)

    def query_weights(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Weight (embed_dim, embed_dim) and bias of the query projection."""
        size = self.embed_dim
        weight = self.q_proj_weight if self.in_proj_weight is None else self.in_proj_weight[:size]
        return weight, None if self.in_proj_bias is None else self.in_proj_bias[:size]

    def key_value_weights(self) -> KeyValueWeights:
        """Weights and biases of the key and value projections."""
        size = self.embed_dim
        if self.in_proj_weight is None:
            key: Tensor = self.k_proj_weight
            value: Tensor = self.v_proj_weight
        else:
            key, value = self.in_proj_weight[size : 2 * size], self.in_proj_weight[2 * size :]
        bias = self.in_proj_bias
        return KeyValueWeights(
            key, value, None if bias is None else bias[size : 2 * size], None if bias is None else bias[2 * size :]
        )

    def precompute_kv(
        self, context: Tokens, value: Tokens | None = None, *, context_mask: torch.Tensor | None = None
    ) -> ContextKV:
        """Project a context once, for any number of calls with ``context_kv=`` (decoding steps, several prompts)."""
        packed, layout = pack(context, context_mask, name="context")
        values = None if value is None else packed.with_values(layout.pack_like(value, "value"))
        return self.key_value_weights().project(packed, self.num_heads, values)

    def forward(
        self,
        query: Tokens,
        context: Tokens | None = None,
        value: Tokens | None = None,
        *,
        query_mask: torch.Tensor | None = None,
        context_mask: torch.Tensor | None = None,
        context_kv: ContextKV | None = None,
        kv_range: torch.Tensor | None = None,
        key_bias: torch.Tensor | None = None,
    ) -> Tokens:
        """Attend.

        Args:
            query: (batch, Lq, embed_dim), or PackedTokens with values (total_q, embed_dim).
            context: (batch, Lk, kdim) or PackedTokens; None with ``context_kv``.
            value: features of the values where they are not the context's, in the context's form.
            query_mask: (batch, Lq) boolean, True = valid token; for a padded query.
            context_mask: (batch, Lk) boolean; for a padded context.
            context_kv: result of :meth:`precompute_kv`.
            kv_range: (batch, Lq, 2) int32 for a padded query, (total_q, 2) for a packed one: query i sees its
                sequence's valid context tokens [start, end), counted without padding.
            key_bias: (total_k,) or (total_k, num_heads) float32, added to the scores; by packed context row.

        Returns:
            As ``query``: (batch, Lq, embed_dim) with zeros in padding, or PackedTokens.

        Raises:
            ValueError: neither or both of ``context`` and ``context_kv``; shapes that do not fit.
        """
        packed, layout = pack(query, query_mask, name="query")
        if packed.values.shape[-1] != self.embed_dim:
            raise ValueError(f"query must have width {self.embed_dim}; got {packed.values.shape[-1]}")
        if (context is None) == (context_kv is None):
            raise ValueError("give either context or context_kv")
        heads = F.linear(packed.values, *self.query_weights()).unflatten(-1, (self.num_heads, self.head_dim))
        dropout = self.dropout if self.training else 0.0
        ranges = None if kv_range is None else layout.pack_rows(kv_range)
        if context_kv is not None:
            out = attend(heads, packed, context_kv, kv_range=ranges, key_bias=key_bias, dropout_p=dropout)
            return layout.restore(self.out_proj(out))
        assert context is not None
        features, context_layout = pack(context, context_mask, name="context")
        if features.values.shape[-1] != self.kdim:
            raise ValueError(f"context must have width {self.kdim}; got {features.values.shape[-1]}")
        if value is None and self.vdim != self.kdim:
            raise ValueError(f"value must be given: its width {self.vdim} is not the context's {self.kdim}")
        values = None if value is None else features.with_values(context_layout.pack_like(value, "value"))
        out = cross_attend(
            heads,
            packed,
            features,
            self.key_value_weights(),
            value=values,
            absorb=self.absorb,
            kv_range=ranges,
            key_bias=key_bias,
            dropout_p=dropout,
        )
        return layout.restore(self.out_proj(out))

    def extra_repr(self) -> str:
        """Arguments that repr() shows."""
        return f"embed_dim={self.embed_dim}, num_heads={self.num_heads}, absorb={self.absorb!r}"
