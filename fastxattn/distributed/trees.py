"""Rows of nested inputs and outputs: tensors, mappings, tuples and lists of them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor


def mapped(name: str, tree: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """``tree`` with every tensor changed; containers keep their type, other values stay.

    Raises:
        TypeError: something that is neither a container nor a plain value, by its ``name`` in the tree.
    """
    if isinstance(tree, Tensor):
        return change(tree)
    if isinstance(tree, Mapping):
        # A copy keeps the type and the attributes, as of transformers' BatchEncoding.
        result: Any = copy.copy(tree)
        for key, value in tree.items():
            result[key] = mapped(f"{name}[{key!r}]", value, change)
        return result
    if isinstance(tree, (tuple, list)):
        items = [mapped(f"{name}[{i}]", value, change) for i, value in enumerate(tree)]
        return type(tree)(*items) if hasattr(tree, "_fields") else type(tree)(items)
    if tree is None or isinstance(tree, (bool, int, float, str)):
        return tree
    raise TypeError(
        f"{name} must be a tensor, a mapping, a tuple, a list, None, a number or a string; got {type(tree).__name__}"
    )


def leaves(name: str, tree: Any) -> list[Tensor]:
    """The tensors of ``tree``, in order."""
    found: list[Tensor] = []

    def note(x: Tensor) -> Tensor:
        found.append(x)
        return x

    mapped(name, tree, note)
    return found


def replaced(tree: Any, tensors: list[Tensor]) -> Any:
    """``tree`` with ``tensors`` in the places of its own."""
    remaining = iter(tensors)
    return mapped("", tree, lambda _: next(remaining))


def row_count(name: str, tree: Any) -> int:
    """The length of the first axis of every tensor that has one.

    Raises:
        ValueError: there is no such tensor, or two differ.
    """
    counts = {x.shape[0] for x in leaves(name, tree) if x.dim()}
    if len(counts) != 1:
        found = "no tensor" if not counts else f"tensors of {' and '.join(map(str, sorted(counts)))} rows"
        raise ValueError(f"{name} must hold tensors with one number of rows (their first axis); got {found}")
    return counts.pop()


def rows_between(name: str, tree: Any, start: int, stop: int) -> Any:
    """Rows ``start`` to ``stop`` of every tensor; those without an axis stay."""
    return mapped(name, tree, lambda x: x[start:stop] if x.dim() else x)
