"""Inputs that break exported models: made from one example, for :func:`fastxattn.export.verify`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fastxattn.export.flat import is_packed
from fastxattn.export.sizes import Inputs
from fastxattn.packed import PackedTokens


def vary(args: Sequence[Any], kwargs: Mapping[str, Any], seed: int = 0) -> Iterator[tuple[str, Inputs]]:
    """(name, inputs) pairs: the example itself, then what follows from its structure.

    * every floating-point value made 30 times larger (softmax at its limits);
    * PackedTokens: ragged lengths with an empty sequence, one sequence, only empty ones, rows of NaN past the end;
    * padded tensors with boolean masks (batch, length): ragged masks, a row without any token;
    * other tensors that share their first axis: a batch of 1 and a batch twice as large.

    Lengths change only when every tensor among the inputs is packed: nothing else says what would have to follow.
    """
    example: Inputs = (tuple(args), dict(kwargs))
    generator = torch.Generator().manual_seed(seed)
    leaves = pytree.tree_leaves(example, is_leaf=is_packed)
    packed = [leaf for leaf in leaves if is_packed(leaf)]
    plain = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    yield "example", example
    yield "values x 30", _map(example, lambda x: x * 30 if x.is_floating_point() else x)
    if packed and not plain:
        yield from _packed_cases(example, generator)
    masks = [t for t in plain if t.dtype == torch.bool and t.ndim == 2]
    if masks and not packed:
        yield "ragged masks", _map(example, lambda x: _ragged_mask(x, False) if _is_mask(x) else x)
        yield "a row without tokens", _map(example, lambda x: _ragged_mask(x, True) if _is_mask(x) else x)
    sizes = {t.shape[0] for t in plain if t.ndim}
    if plain and not packed and len(sizes) == 1 and all(t.ndim for t in plain):
        yield "batch of 1", _map(example, lambda x: x[:1])
        yield "batch doubled", _map(example, lambda x: torch.cat([x, x.flip(0)]))


def _packed_cases(example: Inputs, generator: torch.Generator) -> Iterator[tuple[str, Inputs]]:
    def relength(pattern: Sequence[float], extra: int = 0) -> Inputs:
        place = iter(range(1 << 30))

        def one(tokens: Any) -> Any:
            if not is_packed(tokens):
                return tokens
            # Each input gets the pattern from another start, so that lengths differ between inputs too.
            shift = next(place)
            longest = max(3, tokens.max_seqlen)
            turned = [pattern[(i + shift) % len(pattern)] for i in range(len(pattern))]
            lengths = [round(f * longest) for f in turned]
            rows = torch.randn(sum(lengths) + extra, *tokens.values.shape[1:], generator=generator)
            rows[sum(lengths) :] = float("nan")
            values = (
                rows.to(tokens.values.dtype)
                if tokens.values.is_floating_point()
                else tokens.values[:1].expand(sum(lengths) + extra, *tokens.values.shape[1:])
            )
            offsets = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
            return PackedTokens(values, offsets, max(lengths, default=0))

        return pytree.tree_map(one, example, is_leaf=is_packed)  # type: ignore[no-any-return]

    yield "ragged, one empty", relength([0.4, 0.0, 1.0, 0.7, 1.3])
    yield "one sequence", relength([1.0])
    yield "only empty sequences", relength([0.0, 0.0])
    yield "no keys for some", relength([0.0, 1.0])
    yield "NaN past the last offset", relength([0.5, 1.0], extra=3)


def _is_mask(x: Tensor) -> bool:
    return x.dtype == torch.bool and x.ndim == 2


def _ragged_mask(mask: Tensor, empty_row: bool) -> Tensor:
    batch, length = mask.shape
    lengths = torch.arange(batch) * 7 % max(1, length) + 1
    if empty_row and batch:
        lengths[0] = 0
    return torch.arange(length) < lengths[:, None]


def _map(example: Inputs, change: Any) -> Inputs:
    def leaf(x: Any) -> Any:
        if is_packed(x):
            return PackedTokens(change(x.values), x.cu_seqlens, x.max_seqlen) if x.values.is_floating_point() else x
        return change(x) if isinstance(x, Tensor) else x

    return pytree.tree_map(leaf, example, is_leaf=is_packed)  # type: ignore[no-any-return]
