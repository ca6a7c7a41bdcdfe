"""TemporalCrossAttention: attention between streams with timestamps, within a tolerance window."""

from __future__ import annotations

import torch

from fastxattn.nn.multihead import MultiheadCrossAttention
from fastxattn.nn.packing import Layout, Tokens, pack
from fastxattn.nn.projected import Absorb
from fastxattn.ranges import check_limit, timestamp_kv_range


class TemporalCrossAttention(MultiheadCrossAttention):
    """Each query attends to the context tokens whose time is near its own: speech to video, captions to audio.

    A query at time t sees context tokens with times in [t - before, t + after]. The window is a range of keys, so
    that work outside of it is skipped, never masked. Parameters are :class:`MultiheadCrossAttention`'s.

    Args:
        embed_dim: width of the queries and of the output.
        num_heads: heads.
        before: how far back a query looks, in the unit of the timestamps.
        after: how far ahead; default as far as back.
        dropout, bias, kdim, absorb, device, dtype: as in :class:`MultiheadCrossAttention`.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        before: float,
        after: float | None = None,
        dropout: float = 0.0,
        bias: bool = True,
        kdim: int | None = None,
        absorb: Absorb = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(embed_dim, num_heads, dropout, bias, kdim, kdim, absorb, device, dtype)
        self.before, self.after = before, before if after is None else after
        for name, limit in (("before", self.before), ("after", self.after)):
            check_limit(name, limit)
            if limit < 0:
                raise ValueError(f"{name} must not be negative; got {limit}")

    def forward(  # type: ignore[override]
        self,
        query: Tokens,
        context: Tokens,
        query_times: torch.Tensor,
        context_times: torch.Tensor,
        *,
        query_mask: torch.Tensor | None = None,
        context_mask: torch.Tensor | None = None,
    ) -> Tokens:
        """Attend within the window.

        Args:
            query: (batch, Lq, embed_dim) or PackedTokens.
            context: (batch, Lk, kdim) or PackedTokens.
            query_times: (batch, Lq) for padded queries, (total_q,) for packed ones; floating or integer, compared
                exactly (:func:`fastxattn.ranges.timestamp_kv_range`).
            context_times: (batch, Lk) or (total_k,), ascending within each sequence.
            query_mask: (batch, Lq) boolean, True = valid token.
            context_mask: (batch, Lk) boolean.

        Returns:
            As ``query``. A query with nothing in its window gets the output projection's bias.
        """
        packed, layout = pack(query, query_mask, name="query")
        features, context_layout = pack(context, context_mask, name="context")
        ranges = timestamp_kv_range(
            _packed_times("query_times", query_times, layout),
            _packed_times("context_times", context_times, context_layout),
            packed.cu_seqlens,
            features.cu_seqlens,
            self.before,
            self.after,
        )
        out = super().forward(packed, features, kv_range=ranges)
        assert not isinstance(out, torch.Tensor)
        return layout.restore(out.values)


def _packed_times(name: str, times: torch.Tensor, layout: Layout) -> torch.Tensor:
    """(rows,) times of the valid tokens; refuses times of another shape than the tokens."""
    shape = layout.padded or (layout.packed.values.shape[0] + layout.unused,)
    if tuple(times.shape) != tuple(shape):
        raise ValueError(f"{name} must have shape {tuple(shape)}, like its tokens; got {tuple(times.shape)}")
    return layout.pack_rows(times)
