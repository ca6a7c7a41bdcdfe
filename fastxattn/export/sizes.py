"""Example inputs at other sizes: what an export is traced at, and what its file is compared at."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fastxattn.export.flat import bind, is_packed, name_leaves
from fastxattn.packed import PackedTokens

Inputs = tuple[tuple[Any, ...], dict[str, Any]]
Axis = tuple[int, int]
"""(place of the leaf, axis); a PackedTokens is one leaf: axis 0 is its sequences, axis 1 its lengths."""


class Example:
    """Arguments of a call whose sizes can be changed."""

    def __init__(
        self,
        module: torch.nn.Module,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        fixed: Collection[tuple[str, int]],
    ) -> None:
        self.leaves, self._spec = pytree.tree_flatten((tuple(args), dict(kwargs)), is_leaf=is_packed)
        named = {id(leaf): name for name, leaf in name_leaves(bind(module, args, kwargs), is_leaf=is_packed)}
        self._names = [named.get(id(leaf), f"input {i}") for i, leaf in enumerate(self.leaves)]
        self.axes = {
            (i, axis): size
            for i, leaf in enumerate(self.leaves)
            for axis, size in enumerate(_sizes(leaf))
            if (_tensor_name(leaf, self._names[i], axis), 0 if is_packed(leaf) else axis) not in fixed
        }

    def title(self, changes: Mapping[Axis, int]) -> str:
        """Describe ``changes``: "axis 1 of text at 6"."""
        by_place: dict[tuple[str, int], list[str]] = {}
        for (leaf, axis), size in changes.items():
            place = ("sequences", "lengths")[axis] if is_packed(self.leaves[leaf]) else f"axis {axis}"
            by_place.setdefault((place, size), []).append(self._names[leaf])
        return ", ".join(f"{place} of {' and '.join(names)} at {size}" for (place, size), names in by_place.items())

    def resized(self, changes: Mapping[Axis, int]) -> Inputs:
        """The arguments with other sizes; tensors repeat or end early, so that indices stay valid."""
        leaves = [
            _resize(leaf, {axis: size for (place, axis), size in changes.items() if place == i})
            for i, leaf in enumerate(self.leaves)
        ]
        return pytree.tree_unflatten(leaves, self._spec)  # type: ignore[no-any-return]

    def grown(self, accepts: Callable[[Inputs], bool]) -> Inputs:
        """The arguments with axes of size 0 and 1 made larger where the module takes that.

        A tracer takes a size of 0 or 1 for a property of the module.
        """
        small = [key for key, size in self.axes.items() if size <= 1]
        changes: dict[Axis, int] = {}
        for group in _groups(small, lambda key: 0, lambda key: key[1], lambda key: key):
            wider = {key: 3 + 2 * key[1] for key in group if key not in changes}
            if wider and accepts(self.resized({**changes, **wider})):
                changes |= wider
        return self.resized(changes)

    def variations(self) -> Iterator[Variation]:
        """Other sizes, axes that may belong together changed together and alone."""
        large = [key for key, size in self.axes.items() if size > 1]
        together = list(_groups(large, lambda key: (key[1], self.axes[key]), lambda key: (key[1] > 0, self.axes[key])))
        alone = [[key] for key in large if [key] not in together]
        for group in (*together, *alone):
            size = self.axes[group[0]]
            for other in (size + 1, 1) if group in together else (size + 1,):
                # A mask whose axis alone shrinks to 1 broadcasts, for a module that checks nothing.
                all_of_it = sum(self.axes[key] == size for key in large) == len(group)
                yield self._variation(dict.fromkeys(group, other), group in together and (other > 1 or all_of_it))
        lengths = [key for key in self.axes if is_packed(self.leaves[key[0]]) and key[1] == 1]
        for group in _groups(lengths, lambda key: 0, lambda key: key):
            for other in (0, 1) if len(group) > 1 else (0,):
                yield self._variation(dict.fromkeys(group, other), True)

    def _variation(self, changes: Mapping[Axis, int], consistent: bool) -> Variation:
        leaves = [(self.leaves[place], axis) for place, axis in changes]
        widths = all(not is_packed(x) and x.is_floating_point() and 3 <= x.ndim == axis + 1 for x, axis in leaves)
        return Variation(self.title(changes), self.resized(changes), consistent, widths)


@dataclass(frozen=True)
class Variation:
    """Arguments at other sizes."""

    title: str
    inputs: Inputs
    consistent: bool
    """Whether axes of equal size changed together; one alone may be a size that only an unchecked module takes."""
    widths: bool = False
    """Only feature widths changed, which a module may fix."""


def _groups(keys: Sequence[Axis], *by: Callable[[Axis], Any]) -> Iterator[list[Axis]]:
    seen: set[tuple[Axis, ...]] = set()
    for criterion in by:
        parts: dict[Any, list[Axis]] = {}
        for key in keys:
            parts.setdefault(criterion(key), []).append(key)
        for part in parts.values():
            if tuple(part) not in seen:
                seen.add(tuple(part))
                yield part


def _tensor_name(leaf: Any, name: str, axis: int) -> str:
    return f"{name}_{('cu_seqlens', 'values')[axis]}" if is_packed(leaf) else name


def _sizes(leaf: Any) -> Iterable[int]:
    if is_packed(leaf):
        return len(leaf.cu_seqlens) - 1, int(leaf.cu_seqlens.diff().max()) if len(leaf.cu_seqlens) > 1 else 0
    return leaf.shape if isinstance(leaf, Tensor) else ()


def _resize(leaf: Any, sizes: Mapping[int, int]) -> Any:
    if not sizes:
        return leaf
    if is_packed(leaf):
        lengths = leaf.cu_seqlens.diff().tolist() or [0]
        lengths = [lengths[i % len(lengths)] for i in range(sizes.get(0, len(leaf.cu_seqlens) - 1))]
        if 1 in sizes:  # the longest; the others shorter, so that they stay ragged
            lengths = [max(0, sizes[1] - i % 3) for i in range(len(lengths))]
            if sizes[1] == 0 and len(lengths) > 1:  # one empty sequence among others
                lengths = [0, *(int(n) + 1 for n in leaf.cu_seqlens.diff()[1:])]
        offsets = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
        return PackedTokens(_repeat(leaf.values, 0, sum(lengths)), offsets, max(lengths, default=0))
    for axis, size in sizes.items():
        leaf = _repeat(leaf, axis, size)
    return leaf


def _repeat(x: Tensor, axis: int, size: int) -> Tensor:
    """The first entries, or all and then the last one again, floating-point values growing.

    So sorted sequences and offsets stay sorted, indices valid, and rows of a larger batch different.
    """
    count = x.shape[axis]
    if count == 0:
        return x.new_zeros([*x.shape[:axis], size, *x.shape[axis + 1 :]])
    place = torch.arange(size)
    wide = x.index_select(axis, place.clamp(max=count - 1))
    if x.is_floating_point() and size > count:
        step = (place - count + 1).clamp(min=0).to(x.dtype) / 8
        wide = wide + step.reshape([-1] + [1] * (x.ndim - axis - 1))
    return wide
