"""PackedTokens: token sets of different lengths, one after the other, with no padding between them."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, overload

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.data._utils.collate import default_collate_fn_map

from fastxattn.ops.checks import check_contents, check_mask, readable
from fastxattn.ops.fields import TensorFields, describe, describe_lengths

if TYPE_CHECKING:
    from typing_extensions import Self

Index = int | slice | Sequence[int] | Sequence[bool] | Tensor


@dataclass(frozen=True, eq=False, repr=False)
class PackedTokens(TensorFields):
    """Tokens of ``batch`` sequences laid end to end; sequence ``b`` is ``values[cu_seqlens[b]:cu_seqlens[b + 1]]``.

    ::

        values      a0 a1 a2 | b0 | c0 c1          (total, ...)
        cu_seqlens  0          3    4       6      (batch + 1,) int32; an empty sequence repeats an offset
        max_seqlen  3

    ``values`` may have more rows than ``cu_seqlens[-1]``; nothing reads those. A pytree of its three fields, so
    ``torch.compile`` and ``torch.export`` carry it.

    Used like a tensor of sequences: ``to`` (a dtype is that of ``values``), ``pin_memory``, ``len``, iteration,
    indexing, :meth:`cat`, ``==``, ``pickle``, ``torch.load(weights_only=True)``; ``default_collate`` concatenates.
    Indexing, iteration, ``cat`` and ``==`` read the offsets (wait for a GPU), and drop rows beyond ``cu_seqlens[-1]``.

    Args:
        values: (total, ...), any dtype.
        cu_seqlens: (batch + 1,) int32 on the device of ``values``: 0, then the running sum of the lengths.
        max_seqlen: a bound on the lengths.

    Raises:
        TypeError: a field has the wrong type or dtype.
        ValueError: a shape or device is wrong; on the CPU also offsets that do not start at 0, decrease or end past
            the rows, and a ``max_seqlen`` below the longest length (on a GPU looking would wait for the device).
            Nothing is checked under ``torch.compile``.
    """

    _lead: ClassVar[str] = "values"

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
        if isinstance(self.max_seqlen, bool) or not isinstance(self.max_seqlen, int | torch.SymInt):
            raise TypeError(f"max_seqlen must be an int; got {type(self.max_seqlen).__name__}")
        if self.max_seqlen < 0:
            raise ValueError(f"max_seqlen must not be negative; got {self.max_seqlen}")
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

    # As a tensor of sequences ----------------------------------------------------------------------------------

    @property
    def dtype(self) -> torch.dtype:
        """Of ``values``."""
        return self.values.dtype

    @property
    def requires_grad(self) -> bool:
        """Of ``values``."""
        return self.values.requires_grad

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """Ask for a gradient of ``values``; returns ``self``."""
        self.values.requires_grad_(requires_grad)
        return self

    def __len__(self) -> int:
        """The number of sequences."""
        return self.batch_size

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.to_list())

    @overload
    def __getitem__(self, index: int) -> Tensor: ...
    @overload
    def __getitem__(self, index: slice | Sequence[int] | Sequence[bool] | Tensor) -> PackedTokens: ...
    def __getitem__(self, index: Index) -> Tensor | PackedTokens:
        """Values of one sequence (a view), or several sequences: a slice (of step 1: a view), numbers or a mask."""
        if isinstance(index, slice):
            chosen = range(self.batch_size)[index]
            if chosen.step == 1:
                return self._between(chosen.start, max(chosen.start, chosen.stop))
            return self._take(torch.tensor(chosen, dtype=torch.int64, device="cpu"))
        if isinstance(index, tuple | bool):
            raise TypeError(f"index must be a number, slice, list or tensor of sequences; got {index!r}")
        if getattr(index, "ndim", 0) == 0 and hasattr(index, "__index__"):
            if getattr(index, "dtype", None) == torch.bool:
                raise TypeError("index must be a number, slice, list or tensor of sequences; got one bool")
            number = int(_numbers([operator.index(index)], self.batch_size))
            start, end = self.cu_seqlens[number : number + 2].tolist()
            return self.values[start:end]
        return self._take(_numbers(index, self.batch_size))

    def _between(self, first: int, last: int) -> PackedTokens:
        offsets = self.cu_seqlens[first : last + 1]
        bounds = offsets.tolist()
        longest = max([0, *(b - a for a, b in itertools.pairwise(bounds))])
        return self._with(
            {"values": self.values[bounds[0] : bounds[-1]], "cu_seqlens": offsets - bounds[0], "max_seqlen": longest}
        )

    def _take(self, numbers: Tensor) -> PackedTokens:
        numbers = numbers.to(self.device)
        lengths = self.lengths[numbers]
        counts = lengths.tolist()
        _check_total(sum(counts))
        offsets = _offsets(lengths)
        shift = (self.cu_seqlens[numbers] - offsets[:-1]).long()
        rows = shift.repeat_interleave(lengths.long(), output_size=sum(counts))
        rows += torch.arange(sum(counts), device=self.device)
        values = self.values.index_select(0, rows)
        return self._with({"values": values, "cu_seqlens": offsets, "max_seqlen": max([0, *counts])})

    @classmethod
    def cat(cls, tokens: Sequence[PackedTokens]) -> PackedTokens:
        """One batch of all sequences of ``tokens``, in order. Differentiable. At least one is needed."""
        batches = list(tokens)
        if not batches:
            raise ValueError("tokens must hold at least one PackedTokens; got none")
        for other in batches:
            if not isinstance(other, PackedTokens):
                raise TypeError(f"tokens must hold PackedTokens; got {type(other).__name__}")
        first = batches[0]
        for what in ("device", "dtype"):
            if len(found := {str(getattr(t, what)) for t in batches}) > 1:
                raise ValueError(f"tokens must have one {what}; got {', '.join(sorted(found))}")
        for other in batches:
            if other.values.shape[1:] != first.values.shape[1:]:
                shapes = f"{tuple(first.values.shape)} and {tuple(other.values.shape)}"
                raise ValueError(f"tokens must have values of one shape but for the rows; got {shapes}")
        ends = torch.stack([t.cu_seqlens[-1] for t in batches]).tolist()  # one wait for all
        _check_total(sum(ends))
        starts = itertools.accumulate(ends, initial=0)
        offsets = [t.cu_seqlens[1:] + start for t, start in zip(batches, starts, strict=False)]
        changes = {
            "values": torch.cat([t.values[:end] for t, end in zip(batches, ends, strict=True)]),
            "cu_seqlens": torch.cat([first.cu_seqlens[:1], *offsets]),
            "max_seqlen": max(t.max_seqlen for t in batches),
        }
        return first._with(changes)

    def __eq__(self, other: object) -> bool:
        """Whether both hold the same sequences: lengths, dtype and values, as ``torch.equal`` compares them."""
        if not isinstance(other, PackedTokens):
            return NotImplemented
        if self is other or self.dtype != other.dtype or self.values.shape[1:] != other.values.shape[1:]:
            return self is other
        if not torch.equal(self.cu_seqlens, other.cu_seqlens):
            return False
        used = int(self.cu_seqlens[-1])
        return torch.equal(self.values[:used], other.values[:used])

    __hash__ = object.__hash__  # as for a tensor: by identity

    def __repr__(self) -> str:
        return (
            f"PackedTokens({describe_lengths(self.cu_seqlens)}, values={describe(self.values)}, "
            f"max_seqlen={self.max_seqlen})"
        )

    # Padded ----------------------------------------------------------------------------------------------------

    @classmethod
    def from_padded(cls, values: Tensor, mask: Tensor | None = None) -> PackedTokens:
        """Take the valid tokens out of a padded batch. Differentiable.

        Args:
            values: (batch, length, ...).
            mask: (batch, length) boolean, True where there is a token; they need not be a prefix. None: all are.

        On a GPU this waits for the device: the number of rows depends on the mask.
        """
        if not isinstance(values, Tensor) or not isinstance(mask, Tensor | None):
            name, got = ("mask", mask) if isinstance(values, Tensor) else ("values", values)
            raise TypeError(f"{name} must be a tensor; got {type(got).__name__}")
        if values.ndim < 2:
            raise ValueError(f"values must have shape (batch, length, ...); got {tuple(values.shape)}")
        batch, length = values.shape[:2]
        if mask is None:
            _check_total(batch * length)
            offsets = torch.arange(batch + 1, dtype=torch.int32, device=values.device) * length
            return cls(values.flatten(0, 1), offsets, length)
        check_mask("mask", mask, values)
        return cls(values[mask], _offsets(mask.sum(1)), length)

    def to_padded(self, fill: float = 0, length: int | None = None) -> tuple[Tensor, Tensor]:
        """Back to a padded batch: values (batch, length, ...) and mask (batch, length). Differentiable.

        Args:
            fill: what stands where there is no token.
            length: of the padded axis, ``max_seqlen`` when None; every sequence must fit.
        """
        if length is not None and (isinstance(length, bool) or not isinstance(length, int | torch.SymInt)):
            raise TypeError(f"length must be an int or None; got {type(length).__name__}")
        if length is not None and length < 0:
            raise ValueError(f"length must not be negative; got {length}")
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
        return torch.where(shown, padded, torch.full_like(padded[:0].sum(), fill, dtype=self.dtype)), mask

    # Lists and nested tensors ----------------------------------------------------------------------------------

    @classmethod
    def from_list(cls, tensors: Sequence[Tensor]) -> PackedTokens:
        """Pack tensors of shape (length_i, ...), at least one, of one trailing shape, dtype and device."""
        tensors = list(tensors)
        if not tensors:
            raise ValueError("tensors must hold at least one tensor; got none")
        for t in tensors:
            if not isinstance(t, Tensor) or t.ndim == 0:
                raise TypeError(f"tensors must hold tensors of shape (length, ...); got {describe(t)}")
            for what in ("dtype", "device"):
                if (got := getattr(t, what)) != (first := getattr(tensors[0], what)):
                    raise ValueError(f"tensors must have one {what}; got {first} and {got}")
            if t.shape[1:] != tensors[0].shape[1:]:
                shapes = f"{tuple(tensors[0].shape)} and {tuple(t.shape)}"
                raise ValueError(f"tensors must have one shape but for the rows; got {shapes}")
        lengths = [t.shape[0] for t in tensors]
        _check_total(sum(lengths))
        offsets = _offsets(torch.tensor(lengths, device=tensors[0].device))
        return cls(torch.cat(tensors), offsets, max(lengths))

    def to_list(self) -> list[Tensor]:
        """Views of the sequences, (length_i, ...) each. Reads the offsets (waits for a GPU)."""
        bounds = self.cu_seqlens.tolist()
        return [self.values[a:b] for a, b in itertools.pairwise(bounds)]

    @classmethod
    def from_nested(cls, nested: Any) -> PackedTokens:
        """From a jagged ``torch.nested`` tensor, whose ragged axis becomes axis 0 of ``values``; the others keep their
        order. Differentiable. Reads the longest length (waits for a GPU).
        """
        if not isinstance(nested, Tensor) or not nested.is_nested:
            raise TypeError(f"nested must be a torch.nested tensor; got {describe(nested)}")
        if nested.layout != torch.jagged:
            raise TypeError(
                f"nested must have layout torch.jagged; got {nested.layout}: "
                "convert it with torch.nested.as_nested_tensor(list(nested.unbind()), layout=torch.jagged)"
            )
        source: Any = nested
        if source.lengths() is not None:
            raise ValueError("nested must have no holes between its sequences; call .contiguous() on it first")
        values = source.values().movedim(source._ragged_idx - 1, 0)
        _check_total(values.shape[0])
        offsets = source.offsets().to(torch.int32)
        lengths = offsets.diff()
        return cls(values, offsets, int(lengths.max()) if lengths.numel() else 0)

    def to_nested(self) -> Tensor:
        """As a jagged ``torch.nested`` tensor (batch, j, ...) over the same values."""
        values = self.values
        if readable(self.cu_seqlens):  # its values() have no rows beyond the last sequence
            values = values[: int(self.cu_seqlens[-1])]
        return torch.nested.nested_tensor_from_jagged(values, self.cu_seqlens.long(), max_seqlen=self.max_seqlen)


def _numbers(index: Any, batch: int) -> Tensor:
    """(n,) int64 numbers of sequences from what ``PackedTokens`` was indexed by."""
    try:
        t = index if isinstance(index, Tensor) else torch.as_tensor(index, device="cpu")
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"index must be a number, slice, list or tensor of sequences; got {index!r}") from None
    if t.ndim == 0:
        raise TypeError(f"index must be a number, slice, list or tensor of sequences; got {index!r}")
    if t.ndim != 1:
        raise IndexError(f"index must have one axis, that of the sequences; got shape {tuple(t.shape)}")
    if t.dtype == torch.bool:
        if t.shape[0] != batch:
            raise IndexError(f"index must have one bool per sequence, {batch}; got {t.shape[0]}")
        return t.nonzero()[:, 0]
    if t.numel() == 0:
        return t.long()
    if t.dtype not in (torch.int8, torch.int16, torch.int32, torch.int64):
        raise TypeError(f"index must be of a signed integer type or bool; got {t.dtype}")
    low, high = (int(n) for n in t.aminmax())
    if low < -batch or high >= batch:
        raise IndexError(f"index must lie within the {batch} sequences; got {low if low < -batch else high}")
    return t.long() % batch


def _check_total(rows: int) -> None:
    if not torch.compiler.is_compiling() and rows >= 2**31:
        raise ValueError(f"PackedTokens must have fewer than 2^31 rows, because offsets are int32; got {rows}")


def _offsets(lengths: Tensor) -> Tensor:
    """(batch + 1,) int32 running sum of (batch,) lengths, from 0."""
    return torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)


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


def _collate(batch: list[PackedTokens], *, collate_fn_map: Any = None) -> PackedTokens:
    return PackedTokens.cat(batch)


default_collate_fn_map[PackedTokens] = _collate
torch.serialization.add_safe_globals([PackedTokens])
