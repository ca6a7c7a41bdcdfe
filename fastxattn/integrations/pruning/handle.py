"""The handle of a pruned model, which restores it."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from types import TracebackType

from torch import nn
from typing_extensions import Self

from fastxattn.ops.pruning import Selection
from fastxattn.runtime import html

_claimed: weakref.WeakKeyDictionary[nn.Module, weakref.ref[Pruning]] = weakref.WeakKeyDictionary()
"""Layers that a pruning shortens the input of. The hooks on them keep its handle alive."""


class Pruning:
    """A model that prunes, until :meth:`restore` or the end of a ``with`` block.

    ``last`` is the selection of the latest forward pass, None before the first.
    """

    def __init__(self) -> None:
        self._steps: list[Callable[[], object]] = []
        self.last: Selection | None = None

    def __repr__(self) -> str:
        return f"Pruning({self._state()}, last={self.last!r})"

    def _repr_html_(self) -> str:
        rows = [] if self.last is None else [(html.Markup(self.last._repr_html_()),)]
        return html.table(f"Pruning ({self._state()}), latest selection", (), rows)

    def _state(self) -> str:
        return "active" if self._steps else "restored"

    def restore(self) -> None:
        """Take the pruning out of the model, which is then what it was. A second call does nothing."""
        while self._steps:
            self._steps.pop()()

    def at_restore(self, *steps: Callable[[], object]) -> None:
        """Add steps to :meth:`restore`, which takes the last first."""
        self._steps += steps

    def claim(self, layers: nn.ModuleList) -> None:
        """Hold ``layers`` until the restore: two prunings would not know of each other's lengths."""
        if layers in _claimed:
            raise ValueError(
                "model must not be pruned already: restore it first (fastxattn.restore, or the handle's restore()), or "
                "give `at` several layers"
            )
        _claimed[layers] = weakref.ref(self)
        self.at_restore(lambda: _claimed.pop(layers, None))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.restore()


def restore_pruning(model: nn.Module) -> None:
    """End every pruning of ``model`` and of its modules."""
    for module in model.modules():
        if (found := _claimed.get(module)) is not None and (handle := found()) is not None:
            handle.restore()
