"""The handle of a pruned model, which restores it."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any

from torch import nn
from typing_extensions import Self

from fastxattn.ops.pruning import Selection
from fastxattn.runtime import html

_MARK = "_fastxattn_pruning"
"""Attribute of the list of layers that a handle prunes. A deepcopy of the model copies the handle with it."""


def _forget(module: nn.Module, name: str) -> None:
    vars(module).pop(name, None)


class PerThread(threading.local):
    """State of the forward pass that a thread runs. A copy starts empty."""

    def __reduce__(self) -> tuple[type[PerThread], tuple[()]]:
        return type(self), ()


class Pruning:
    """A model that prunes, until :meth:`restore` or the end of a ``with`` block.

    ``last`` is the selection of the latest forward pass, None before the first. Threads may run one pruned model; each
    has its own state, and ``last`` is of whichever pruned last.
    """

    def __init__(self) -> None:
        self._steps: list[Callable[[], object]] = []
        self.last: Selection | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "last": None}  # tensors of a graph cannot be copied

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
        """Add steps to :meth:`restore`, which takes the last first; methods and partials, which a deepcopy can copy."""
        self._steps += steps

    def override(self, module: nn.Module, name: str, value: Callable[..., Any] | Pruning) -> None:
        """Give one instance an attribute until the restore."""
        vars(module)[name] = value
        self.at_restore(functools.partial(_forget, module, name))

    def claim(self, layers: nn.ModuleList) -> None:
        """Hold ``layers`` until the restore: two prunings would not know of each other's lengths."""
        if _MARK in vars(layers):
            raise ValueError(
                "model must not be pruned already: restore it first (fastxattn.restore, or the handle's restore()), or "
                "give `at` several layers"
            )
        self.override(layers, _MARK, self)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.restore()


def restore_pruning(model: nn.Module) -> None:
    """End every pruning of ``model`` and of its modules."""
    for module in model.modules():
        if (handle := vars(module).get(_MARK)) is not None:
            handle.restore()
