"""Tensors of given shapes for ``fastxattn explain``: one builder per operation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import fastxattn

Call = tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


@dataclass(frozen=True)
class Shape:
    """What the command's options say."""

    lengths_q: tuple[int, ...]
    lengths_k: tuple[int, ...]
    heads: int
    kv_heads: int
    dim: int
    dtype: str
    device: str
    causal: bool

    def rows(self, lengths: tuple[int, ...], *tail: int) -> Tensor:
        """(total, *tail) zeros."""
        return torch.zeros(sum(lengths), *tail, dtype=DTYPES[self.dtype], device=self.device)

    def offsets(self, lengths: tuple[int, ...]) -> Tensor:
        """(batch + 1,) int32."""
        return torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32, device=self.device)

    @property
    def cu(self) -> tuple[Tensor, Tensor]:
        """Offsets of queries and of keys."""
        return self.offsets(self.lengths_q), self.offsets(self.lengths_k)


def lengths(option: str, text: str) -> tuple[int, ...]:
    """``"8*32,77"`` is eight sequences of 32 and one of 77."""
    found: list[int] = []
    for part in text.split(","):
        count, star, length = part.rpartition("*")
        if not length.strip().isdigit() or (star and not count.strip().isdigit()):
            raise ValueError(f"{option} must be lengths such as 32,77 or 8*32; got {text!r}")
        found += [int(length)] * (int(count) if star else 1)
    return tuple(found)


def problem(op: str, shape: Shape) -> Call:
    """The function of ``op``, its arguments and its keyword arguments.

    Raises:
        ValueError: an unknown operation or dtype, or different numbers of query and key sequences.
    """
    if op not in BUILDERS:
        raise ValueError(f"OP must be one of {', '.join(BUILDERS)}; got {op!r}")
    if shape.dtype not in DTYPES:
        raise ValueError(f"--dtype must be one of {', '.join(DTYPES)}; got {shape.dtype!r}")
    if torch.device(shape.device).type == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch sees no such device here")
    if len(shape.lengths_q) != len(shape.lengths_k):
        raise ValueError(
            f"--lengths-q and --lengths-k must have as many sequences as each other; got {len(shape.lengths_q)} and "
            f"{len(shape.lengths_k)}"
        )
    return BUILDERS[op](shape)


def _attention(s: Shape) -> Call:
    query = s.rows(s.lengths_q, s.heads, s.dim)
    key, value = (s.rows(s.lengths_k, s.kv_heads, s.dim) for _ in range(2))
    options = {}
    if s.causal:
        options["kv_range"] = fastxattn.ranges.causal_kv_range(*s.cu, total_q=sum(s.lengths_q))
    return fastxattn.varlen_cross_attention, (query, key, value, *s.cu), options


def _importance(s: Shape) -> Call:
    query, key = s.rows(s.lengths_q, s.heads, s.dim), s.rows(s.lengths_k, s.kv_heads, s.dim)
    wide = torch.promote_types(query.dtype, torch.float32)
    return fastxattn.key_importance, (query, key, query.new_zeros(query.shape[1::-1], dtype=wide), *s.cu), {}


def _co_attention(s: Shape) -> Call:
    sides = [s.rows(n, s.heads, s.dim) for n in (s.lengths_q, s.lengths_k)]
    return fastxattn.co_attention, (*sides, *sides, *s.cu), {}


def _absorbed_attention(s: Shape) -> Call:
    return fastxattn.absorbed_attention, (s.rows(s.lengths_q, s.heads, s.dim), s.rows(s.lengths_k, s.dim), *s.cu), {}


def _pair(loss: Callable[..., Any]) -> Callable[[Shape], Call]:
    return lambda s: (loss, (s.rows(s.lengths_q, s.dim), s.rows(s.lengths_q, s.dim), 10.0), {})


def _late(call: Callable[..., Any]) -> Callable[[Shape], Call]:
    scale = (10.0,) if call is fastxattn.late_interaction_loss else ()
    return lambda s: (call, (s.rows(s.lengths_q, s.dim), s.rows(s.lengths_k, s.dim), *s.cu, *scale), {})


def _topk(s: Shape) -> Call:
    return fastxattn.topk_similarity, (s.rows(s.lengths_q, s.dim), s.rows(s.lengths_k, s.dim), 1), {}


def _select(s: Shape) -> Call:
    scores = torch.zeros(sum(s.lengths_k), device=s.device)
    return fastxattn.select_tokens, (scores, s.offsets(s.lengths_k), fastxattn.Budget.ratio(0.5)), {}


BUILDERS: dict[str, Callable[[Shape], Call]] = {
    "attention": _attention,
    "importance": _importance,
    "co_attention": _co_attention,
    "absorbed_attention": _absorbed_attention,
    "infonce": _pair(fastxattn.infonce_loss),
    "sigmoid": _pair(fastxattn.sigmoid_loss),
    "maxsim": _late(fastxattn.maxsim),
    "late_interaction": _late(fastxattn.late_interaction_loss),
    "topk": _topk,
    "select": _select,
}
