"""Whether a caller asked for attention maps, which only the dense formula gives."""

from __future__ import annotations

import contextvars
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import torch

from fastxattn.integrations.swap import Adapter

try:
    # The dictionary that transformers' output hooks fill during the current forward; its keys are what was asked for.
    from transformers.utils.output_capturing import _active_collector
except ImportError:  # pragma: no cover - older releases pass output_attentions down as an argument
    _active_collector = None

_argument: contextvars.ContextVar[bool | None] = contextvars.ContextVar("output_attentions", default=None)
_collected: WeakKeyDictionary[Any, bool] = WeakKeyDictionary()
"""By module, whether a hook waited for maps in its last forward: checkpointing recomputes after the hook is gone."""


_dropped: WeakKeyDictionary[Any, bool] = WeakKeyDictionary()


def _waiting() -> Any:
    return () if _active_collector is None else _active_collector.get() or ()


def wants_maps(module: Any, config: Any = None, options: dict[str, Any] | None = None) -> bool:
    """By argument (also an encoder's, :class:`MapsArgument`), by configuration, or by an output hook that waits.

    A pass that checkpointing recomputes gets the answer of the pass that it recomputes.
    """
    asked = (options or {}).get("output_attentions")
    if asked if asked is not None else getattr(config, "output_attentions", False):
        return True
    if torch.compiler.is_compiling():
        return False
    if torch._C._current_graph_task_id() == -1:  # no backward pass is running
        _collected[module] = bool(_argument.get()) or any("attentions" in name for name in _waiting())
    return _collected.get(module, False)


def drops_maps(module: Any) -> bool:
    """Whether an encoder around ``module`` was not asked for maps, so that its layers drop those they ask for."""
    if torch.compiler.is_compiling():
        return False
    if torch._C._current_graph_task_id() == -1:
        _dropped[module] = _argument.get() is False
    return _dropped.get(module, False)


class MapsArgument(Adapter):
    """For encoders that take ``output_attentions`` and do not pass it to their layers (GroundingDINO, Pix2Struct)."""

    does: ClassVar[str] = "passes output_attentions to its layers"

    def forward(self, *args: Any, output_attentions: bool | None = None, **kwargs: Any) -> Any:
        """As the original's."""
        asked = self.config.output_attentions if output_attentions is None else output_attentions  # type: ignore[attr-defined]
        if torch.compiler.is_compiling():
            return super().forward(*args, output_attentions=asked, **kwargs)  # type: ignore[misc]
        token = _argument.set(bool(asked))
        try:
            return super().forward(*args, output_attentions=asked, **kwargs)  # type: ignore[misc]
        finally:
            _argument.reset(token)
