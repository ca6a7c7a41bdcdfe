"""PerceiverResampler: attention of a fixed number of latents over any number of features."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from fastxattn.nn.packing import Tokens, pack
from fastxattn.nn.projected import Absorb, KeyValueWeights, attend, cross_attend
from fastxattn.packed import PackedTokens


class _Attention(nn.Module):
    def __init__(self, width: int, heads: int, head_dim: int, qk_norm: bool) -> None:
        super().__init__()
        self.context_layer_norm = nn.LayerNorm(width)
        self.latents_layer_norm = nn.LayerNorm(width)
        if qk_norm:
            self.q_layer_norm = nn.LayerNorm(head_dim)
            self.k_layer_norm = nn.LayerNorm(head_dim)
        self.q_proj = nn.Linear(width, heads * head_dim, bias=False)
        self.k_proj = nn.Linear(width, heads * head_dim, bias=False)
        self.v_proj = nn.Linear(width, heads * head_dim, bias=False)
        self.output_proj = nn.Linear(heads * head_dim, width, bias=False)


class _MLP(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.ln = nn.LayerNorm(width)
        self.fc = nn.Linear(width, inner, bias=False)
        self.c_proj = nn.Linear(inner, width, bias=False)


class PerceiverResampler(nn.Module):
    """Learned latents attend to the features and to themselves, ``depth`` times.

    Keys and values come from the normalised features and latents together. Parameters and ``state_dict`` of Hugging
    Face's ``IdeficsPerceiverResampler``, which takes no mask; this one takes features of any lengths.

    Args:
        width: of features and latents.
        depth: blocks.
        num_heads: heads.
        head_dim: width of a head.
        latents: how many come out.
        inner: width inside the feed-forward; default 4 * width.
        qk_norm: layer norm of queries and keys per head (then nothing is absorbed).
        absorb: "auto", "on" or "off"; see :class:`fastxattn.nn.MultiheadCrossAttention`.

    Source: Alayrac et al., "Flamingo", 2022; Jaegle et al., "Perceiver", 2021.
    """

    def __init__(
        self,
        width: int,
        depth: int,
        num_heads: int,
        head_dim: int,
        latents: int,
        *,
        inner: int | None = None,
        qk_norm: bool = False,
        absorb: Absorb = "auto",
    ) -> None:
        super().__init__()
        self.num_heads, self.qk_norm, self.absorb = num_heads, qk_norm, absorb
        self.latents = nn.Parameter(torch.randn(latents, width))
        self.blocks = nn.ModuleList(
            nn.ModuleList([_Attention(width, num_heads, head_dim, qk_norm), _MLP(width, inner or 4 * width)])
            for _ in range(depth)
        )
        self.layer_norm = nn.LayerNorm(width)

    @classmethod
    def from_hf(cls, module: Any, absorb: Absorb = "auto") -> PerceiverResampler:
        """A resampler that shares the parameters of an ``IdeficsPerceiverResampler``."""
        with torch.device("meta"):
            new = cls(
                module.embed_dim,
                len(module.blocks),
                module.n_heads,
                module.head_dim,
                module.n_latents,
                inner=module.blocks[0][1].fc.out_features if len(module.blocks) else None,
                qk_norm=module.qk_layer_norms,
                absorb=absorb,
            )
        new.load_state_dict(module.state_dict(keep_vars=True), assign=True)
        return new.train(module.training)

    def _attend(self, block: Any, latents: PackedTokens, joint: PackedTokens) -> torch.Tensor:
        """``joint`` holds each sequence's normalised features and latents; latents arrive normalised."""
        query = block.q_proj(latents.values).unflatten(-1, (self.num_heads, -1))
        weights = KeyValueWeights.of(block.k_proj, block.v_proj)
        if not self.qk_norm:
            return cross_attend(query, latents, joint, weights, absorb=self.absorb)
        kv = weights.project(joint, self.num_heads)
        kv = type(kv)(block.k_layer_norm(kv.key), kv.value, kv.cu_seqlens, kv.max_seqlen)
        return attend(block.q_layer_norm(query), latents, kv)

    def forward(self, context: Tokens, *, context_mask: torch.Tensor | None = None) -> torch.Tensor:
        """Resample.

        Args:
            context: (batch, length, width) or PackedTokens.
            context_mask: (batch, length) boolean, True = valid feature.

        Returns:
            (batch, latents, width).
        """
        features, _ = pack(context, context_mask, name="context")
        batch, count = features.batch_size, self.latents.shape[0]
        states, _ = pack(self.latents.expand(batch, -1, -1), name="latents")
        # Sorting rows by sequence, stably, puts each sequence's latents behind its features.
        owners = torch.cat([features.sequence_ids(), states.sequence_ids()])
        order = owners.sort(stable=True).indices
        offsets, longest = features.cu_seqlens + states.cu_seqlens, features.max_seqlen + count
        values = states.values
        for pair in self.blocks:
            block: Any = pair[0]  # type: ignore[index]
            mlp: Any = pair[1]  # type: ignore[index]
            normed = states.with_values(block.latents_layer_norm(values))
            rows = torch.cat([block.context_layer_norm(features.values), normed.values]).index_select(0, order)
            values = values + block.output_proj(self._attend(block, normed, PackedTokens(rows, offsets, longest)))
            values = values + mlp.c_proj(F.relu(mlp.fc(mlp.ln(values))))
        return self.layer_norm(values).unflatten(0, (batch, count))  # type: ignore[no-any-return]
