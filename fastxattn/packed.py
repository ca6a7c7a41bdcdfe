"""PackedTokens: token sets of different lengths, one after the other, with no padding between them."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fastxattn.ops.offsets import check_contents, readable


@dataclass(frozen=True, eq=False)
class PackedTokens:
    """Tokens of ``batch`` sequences laid end to end; sequence ``b`` is ``values[cu_seqlens[b]:cu_seqlens[b + 1]]``.

    ::

        values      a0 a1 a2 | b0 | c0 c1          (total, ...)
        cu_seqlens  0          3    4       6      (batch + 1,) int32; an empty sequence repeats an offset
        max_seqlen  3

    ``values`` may have more rows than ``cu_seqlens[-1]``; nothing reads those. A pytree of its three fields, so
    ``torch.compile`` and ``torch.export`` carry it.

    Args:
        values: (total, ...), any dtype.
        cu_seqlens: (batch + 1,) int32 on the device of ``values``: 0, then the running sum of the lengths.
        max_seqlen: a bound on the lengths.

    Raises:
        TypeError: a field has the wrong type or dtype.
        ValueError: a shape or device is wrong; on the CPU also offsets that do not start at 0, decrease or end past
            the rows, and a ``max_seqlen`` below the longest length (on a GPU looking would wait for the device).
    """

    values: Tensor
    cu_seqlens: Tensor
    max_seqlen: int

    def __post_init__(self) -> None:
        if torch.compiler.is_compiling():
            return
        values, offsets = self.values, self.cu_seqlens
        for name, t in (("values", values), ("cu_seqlens", offsets)):
            if not isinstance(t, Tensor):
                raise TypeError(f"{name} must be a tensor; got {type(t).__name__}")
        if values.ndim < 1:
            raise ValueError("values must have at least one axis, (total, ...); got a scalar")
        if offsets.dtype != torch.int32:
            raise TypeError(f"cu_seqlens must be int32; got {offsets.dtype}")
        if offsets.ndim != 1 or offsets.shape[0] < 1:
            raise ValueError(f"cu_seqlens must have shape (batch + 1,); got {tuple(offsets.shape)}")
        if offsets.device != values.device:
            raise ValueError(f"cu_seqlens must be on the device of values, {values.device}; got {offsets.device}")
        if readable(offsets):
            check_contents("cu_seqlens", offsets, values.shape[0], "rows of values")
            if self.batch_size and (longest := int(self.lengths.max())) > self.max_seqlen:
                raise ValueError(f"max_seqlen must be at least the longest length, {longest}; got {self.max_seqlen}")

    # What the sequences are ------------------------------------------------------------------------------------

    @property
    def batch_size(self) -> int:
        """The number of sequences."""
        return self.cu_seqlens.shape[0] - 1

    @property
    def lengths(self) -> Tensor:
        """(batch,) int32: tokens of each sequence."""
        return self.cu_seqlens.diff()

    def sequence_ids(self) -> Tensor:
        """(total,) int64: the sequence each row belongs to; ``batch_size`` for rows beyond the last sequence."""
        rows = torch.arange(self.values.shape[0], device=self.values.device, dtype=torch.int32)
        return torch.searchsorted(self.cu_seqlens[1:].contiguous(), rows, right=True)

    def positions(self) -> Tensor:
        """(total,) int64: each row's place in its sequence; rows beyond the last sequence count from its end."""
        rows = torch.arange(self.values.shape[0], device=self.values.device)
        return rows - self.cu_seqlens[self.sequence_ids()]

    def with_values(self, values: Tensor) -> PackedTokens:
        """The same sequences with other values: (total, ...), any trailing shape and dtype."""
        if values.shape[0] != self.values.shape[0]:
            raise ValueError(f"values must have the {self.values.shape[0]} rows they replace; got {values.shape[0]}")
        return PackedTokens(values, self.cu_seqlens, self.max_seqlen)

    # Padded ----------------------------------------------------------------------------------------------------

    @classmethod
    def from_padded(cls, values: Tensor, mask: Tensor | None = None) -> PackedTokens:
        """Take the tokens that are there out of a padded batch. Differentiable.

        Args:
            values: (batch, length, ...).
            mask: (batch, length) boolean, True where there is a token; they need not be a prefix. None: all are.

        On a GPU this waits for the device: the number of rows depends on the mask.
        """
        if values.ndim < 2:
            raise ValueError(f"values must have shape (batch, length, ...); got {tuple(values.shape)}")
        batch, length = values.shape[:2]
        if mask is None:
            offsets = torch.arange(batch + 1, dtype=torch.int32, device=values.device) * length
            return cls(values.flatten(0, 1), offsets, length)
        _check_mask(mask, values)
        return cls(values[mask], _offsets(mask.sum(1)), length)

    def to_padded(self, fill: float = 0, length: int | None = None) -> tuple[Tensor, Tensor]:
        """Back to a padded batch: values (batch, length, ...) and mask (batch, length). Differentiable.

        Args:
            fill: what stands where there is no token.
            length: of the padded axis, ``max_seqlen`` when None; every sequence must fit.
        """
        width = self.max_seqlen if length is None else length
        if length is not None and length < self.max_seqlen and self.batch_size and int(self.lengths.max()) > length:
            raise ValueError(f"length must hold the longest sequence, {int(self.lengths.max())}; got {length}")
        place = torch.arange(width, device=self.values.device)
        mask = place < self.lengths[:, None]
        trailing = self.values.shape[1:]
        if self.values.shape[0] == 0:
            return self.values.new_full((self.batch_size, width, *trailing), fill), mask
        rows = torch.where(mask, self.cu_seqlens[:-1, None] + place, 0)
        padded = self.values.index_select(0, rows.flatten()).unflatten(0, rows.shape)
        # where, not multiply: row 0 stands in for absent tokens and may hold NaN.
        shown = mask.reshape(*mask.shape, *(1 for _ in trailing))
        return torch.where(shown, padded, torch.full_like(padded[:0].sum(), fill)), mask

    # Lists and nested tensors ----------------------------------------------------------------------------------

    @classmethod
    def from_list(cls, tensors: Sequence[Tensor]) -> PackedTokens:
        """Pack tensors of shape (length_i, ...); at least one (its trailing shape and dtype are the result's)."""
        if not tensors:
            raise ValueError("tensors must hold at least one tensor; got an empty list")
        lengths = [t.shape[0] for t in tensors]
        offsets = _offsets(torch.tensor(lengths, device=tensors[0].device))
        return cls(torch.cat(list(tensors)), offsets, max(lengths))

    def to_list(self) -> list[Tensor]:
        """Views of the sequences, (length_i, ...) each. Reads the offsets (waits for a GPU)."""
        bounds = self.cu_seqlens.tolist()
        return [self.values[a:b] for a, b in itertools.pairwise(bounds)]

    @classmethod
    def from_nested(cls, nested: Any) -> PackedTokens:
        """From a jagged ``torch.nested`` tensor (batch, j, ...) whose ragged axis is 1. Reads the longest length."""
        if not nested.is_nested or nested.layout != torch.jagged:
            raise TypeError("nested must be a torch.nested tensor of layout torch.jagged")
        if nested.lengths() is not None:
            raise ValueError("nested must have no holes between its sequences; call .contiguous() on it first")
        offsets = nested.offsets().to(torch.int32)
        lengths = offsets.diff()
        return cls(nested.values(), offsets, int(lengths.max()) if lengths.numel() else 0)

    def to_nested(self) -> Tensor:
        """As a jagged ``torch.nested`` tensor (batch, j, ...) over the same values."""
        return torch.nested.nested_tensor_from_jagged(self.values, self.cu_seqlens.long(), max_seqlen=self.max_seqlen)


def _offsets(lengths: Tensor) -> Tensor:
    """(batch + 1,) int32 running sum of (batch,) lengths, from 0."""
    return torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)


def _check_mask(mask: Tensor, values: Tensor) -> None:
    if mask.dtype != torch.bool:
        raise TypeError(f"mask must be boolean; got {mask.dtype}")
    if mask.shape != values.shape[:2]:
        raise ValueError(f"mask must have shape {tuple(values.shape[:2])}, that of values; got {tuple(mask.shape)}")


def _flatten(tokens: PackedTokens) -> tuple[list[Any], None]:
    return [tokens.values, tokens.cu_seqlens, tokens.max_seqlen], None


def _unflatten(leaves: Iterable[Any], _: None) -> PackedTokens:
    # Past the checks: pytree users put other things than tensors at the leaves.
    tokens = object.__new__(PackedTokens)
    for name, leaf in zip(_FIELDS, leaves, strict=True):
        object.__setattr__(tokens, name, leaf)
    return tokens


def _flatten_with_keys(tokens: PackedTokens) -> tuple[list[tuple[Any, Any]], None]:
    leaves, context = _flatten(tokens)
    return [(pytree.GetAttrKey(name), leaf) for name, leaf in zip(_FIELDS, leaves, strict=True)], context


_FIELDS = ("values", "cu_seqlens", "max_seqlen")
pytree.register_pytree_node(
    PackedTokens,
    _flatten,
    _unflatten,
    serialized_type_name="fastxattn.PackedTokens",
    flatten_with_keys_fn=_flatten_with_keys,
    to_dumpable_context=lambda context: context,
    from_dumpable_context=lambda context: context,
)
