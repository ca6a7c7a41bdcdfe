"""Small modules to export, and example inputs."""

from __future__ import annotations

import torch
from torch import Tensor

from fastxattn.ops.absorbed_attention.api import absorbed_attention
from fastxattn.ops.attention.api import cross_attention, varlen_cross_attention
from fastxattn.ops.importance.api import key_importance
from fastxattn.ops.pruning.api import prune_tokens
from fastxattn.ops.pruning.budget import Budget
from fastxattn.packed import PackedTokens

HEADS, DIM = 4, 8


def packed(*lengths: int, width: int = 32, seed: int = 0) -> PackedTokens:
    generator = torch.Generator().manual_seed(seed + sum(lengths))
    return PackedTokens.from_list([torch.randn(n, width, generator=generator) for n in lengths])


class Varlen(torch.nn.Module):
    """Projections and packed attention; grouped heads and another value width."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.v = torch.nn.Linear(32, 32), torch.nn.Linear(24, 16), torch.nn.Linear(24, 12)

    def forward(self, text: PackedTokens, image: PackedTokens) -> dict[str, Tensor]:
        q = self.q(text.values).unflatten(-1, (HEADS, DIM))
        k, v = self.k(image.values).unflatten(-1, (2, DIM)), self.v(image.values).unflatten(-1, (2, 6))
        out, lse = varlen_cross_attention(q, k, v, text.cu_seqlens, image.cu_seqlens, softcap=5.0, return_lse=True)
        return {"out": out.flatten(1), "lse": lse}


class Padded(torch.nn.Module):
    """Padded attention with a key mask and, where asked, a bias."""

    def __init__(self, biased: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k = torch.nn.Linear(32, 32), torch.nn.Linear(24, 32)
        self.bias = torch.nn.Parameter(torch.randn(1, HEADS, 1, 1)) if biased else None

    def forward(self, text: Tensor, image: Tensor, mask: Tensor) -> Tensor:
        q, k = self.q(text).unflatten(-1, (HEADS, DIM)), self.k(image).unflatten(-1, (HEADS, DIM))
        return cross_attention(q, k, k, key_mask=mask, bias=self.bias).flatten(2)


class Bare(torch.nn.Module):
    """The packed operation with everything that inference needs, as the graph's own inputs."""

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cu_q: Tensor,
        cu_k: Tensor,
        kv_range: Tensor,
        key_bias: Tensor,
        key_index: Tensor,
    ) -> Tensor:
        return varlen_cross_attention(
            query, key, value, cu_q, cu_k, kv_range=kv_range, key_bias=key_bias, key_index=key_index
        )


class Importance(torch.nn.Module):
    def forward(self, text: PackedTokens, image: PackedTokens) -> Tensor:
        q, k = text.values.unflatten(-1, (HEADS, DIM)), image.values.unflatten(-1, (2, DIM))
        cu = text.cu_seqlens, image.cu_seqlens
        _, lse = varlen_cross_attention(q, k, k, *cu, return_lse=True)
        return key_importance(q, k, lse, *cu, reduction="none")


class Context(torch.nn.Module):
    def forward(self, text: PackedTokens, image: PackedTokens) -> Tensor:
        q = text.values.unflatten(-1, (2, 16))
        return absorbed_attention(q, image.values, text.cu_seqlens, image.cu_seqlens, scale=0.25)


class Prune(torch.nn.Module):
    def forward(self, image: PackedTokens) -> dict[str, Tensor]:
        scores = image.values[:, 0]
        protected = image.values[:, 1] > 1.0
        rows, kept = prune_tokens(image.values, scores, image.cu_seqlens, Budget.ratio(0.5), protected=protected)
        back = kept.scatter_back(rows, fill="zero")
        # In a graph, rows and keep_index have the size of the budget's bound; eagerly the exact one.
        return {"sum": rows.sum(0), "offsets": kept.cu_seqlens, "assignment": kept.assignment, "back": back}


def padded_inputs(batch: int = 2, lq: int = 3, lk: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    text, image = torch.randn(batch, lq, 32, generator=generator), torch.randn(batch, lk, 24, generator=generator)
    return text, image, torch.ones(batch, lk, dtype=torch.bool)


def bare_inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(2)
    shapes = ((7, HEADS, DIM), (11, 2, DIM), (11, 2, 6))
    q, k, v = (torch.randn(s, generator=generator).to(dtype) for s in shapes)
    cu_q, cu_k = torch.tensor([0, 3, 3, 7], dtype=torch.int32), torch.tensor([0, 4, 5, 9], dtype=torch.int32)
    spans = torch.tensor([[0, 2], [3, 3], [0, 4], [0, 4], [1, 2], [2, 4], [4, 4]], dtype=torch.int32)
    index = torch.tensor([3, 1, 0, 7, 5, 10, 9, 9, 2], dtype=torch.int32)
    return q, k, v, cu_q, cu_k, spans, torch.randn(11, HEADS, generator=generator), index
