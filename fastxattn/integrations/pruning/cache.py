"""Key-value caches of pruned prompts.

The layers of a pruned cache hold fewer keys than the model has read tokens. They report the length without pruning, so
that positions, masks and ``generate`` count every token; each pruned layer then picks the mask's columns of the keys
that it holds.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Held:
    """The tokens behind the first keys of a pruned layer; tokens after them follow without gaps."""

    positions: Tensor  # (batch, kept) int64 places among all tokens read
    valid: Tensor | None  # (batch, kept) bool; None: every key is of a token
    dropped: int  # tokens read less keys held

    @classmethod
    def everything(cls, batch: int, length: int, device: torch.device) -> Held:
        """An unpruned layer of ``length`` tokens."""
        return cls(torch.arange(length, device=device).expand(batch, -1), None, 0)

    def extended(self, keys: int) -> Held:
        """With the places of the first ``keys`` keys at least."""
        batch, known = self.positions.shape
        more = torch.arange(known, max(keys, known), device=self.positions.device) + self.dropped
        valid = None
        if self.valid is not None:
            valid = torch.cat([self.valid, self.valid.new_ones(batch, len(more))], 1)
        return Held(torch.cat([self.positions, more.expand(batch, -1)], 1), valid, self.dropped)

    def then(self, keep: Tensor, valid: Tensor | None, read: int, length: int) -> Held:
        """With tokens ``keep`` (batch, kept) of ``length`` new ones that follow ``read`` tokens."""
        before = self.extended(read - self.dropped)
        both = None
        if before.valid is not None or valid is not None:
            pieces = ((before.valid, before.positions), (valid, keep))
            both = torch.cat([torch.ones_like(p, dtype=torch.bool) if v is None else v for v, p in pieces], 1)
        return Held(torch.cat([before.positions, keep + read], 1), both, self.dropped + length - keep.shape[1])

    def without(self, count: int) -> Held:
        """Without the last ``count`` tokens, none of which was pruned."""
        left = self.positions.shape[1] - count
        tail = torch.arange(left, left + count, device=self.positions.device) + self.dropped
        if left < 0 or bool((self.positions[:, left:] != tail).any()):
            raise ValueError("a cache can be cropped by the tokens after the last image that was pruned, not by more")
        return Held(self.positions[:, :left], None if self.valid is None else self.valid[:, :left], self.dropped)

    def rows(self, index: Callable[[Tensor], Tensor]) -> Held:
        """The same of other rows of the batch."""
        return Held(index(self.positions), None if self.valid is None else index(self.valid), self.dropped)


class _Shortened:
    """Methods of the classes that :func:`_shortened` makes."""

    held: Held
    _full: type

    def _own(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """A method of the layer as it is, which counts the keys that it holds."""
        mine = self.__class__
        self.__class__ = mine._full
        try:
            return getattr(self, name)(*args, **kwargs)
        finally:
            self.__class__ = mine

    def update(self, *args: Any, **kwargs: Any) -> Any:
        return self._own("update", *args, **kwargs)

    def get_seq_length(self) -> Any:
        return self._own("get_seq_length") + self.held.dropped

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        length, offset = self._own("get_mask_sizes", query_length)
        return length + offset + self.held.dropped, 0

    def reset(self) -> None:
        self.__class__ = self._full
        del self.held
        self.reset()

    def crop(self, tokens_to_remove: int) -> None:
        cut = abs(tokens_to_remove) - (int(self._own("get_seq_length")) - self.held.positions.shape[1])
        if cut > 0:
            self.held = self.held.without(cut)
        self._own("crop", tokens_to_remove)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._own("reorder_cache", beam_idx)
        self.held = self.held.rows(lambda t: t.index_select(0, beam_idx.to(t.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._own("batch_repeat_interleave", repeats)
        self.held = self.held.rows(lambda t: t.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._own("batch_select_indices", indices)
        self.held = self.held.rows(lambda t: t[indices])


@functools.cache
def _shortened(kind: Any) -> type:
    # Methods are copied because instances can change only to a class of one base. A class with a _layer_type would
    # register itself in Transformers, and a compiled step would not see the hooks.
    methods = {name: value for name, value in vars(_Shortened).items() if inspect.isfunction(value)}
    return type(kind.__name__, (kind,), {**methods, "_full": kind, "_layer_type": None, "is_compileable": False})


def _is_shortened(layer: Any) -> bool:
    return hasattr(type(layer), "_full")


def shorten(layer: Any, held: Held) -> None:
    """Make a cache layer report the length without pruning."""
    if not _is_shortened(layer):
        layer.__class__ = _shortened(layer.__class__)
    layer.held = held


def held_by(layer: Any) -> Held | None:
    """What a cache layer holds; None: every token read."""
    return layer.held if _is_shortened(layer) else None


def own_sizes(layer: Any, queries: int) -> tuple[int, int]:
    """How many keys a layer attends to with ``queries`` new ones, and the place of the first among its keys."""
    sizes = layer._own("get_mask_sizes", queries) if _is_shortened(layer) else layer.get_mask_sizes(queries)
    return int(sizes[0]), int(sizes[1])


def mask_offset(cache: Any, sliding: bool, queries: int) -> int:
    """The place of the first column of the mask that Transformers makes for layers of one kind."""
    kinds = [bool(getattr(layer, "is_sliding", False)) for layer in getattr(cache, "layers", ())]
    if sliding not in kinds:
        return 0
    return int(cache.get_mask_sizes(queries, kinds.index(sliding))[1])
