"""Whether a caller asked for attention maps, which only the dense formula gives."""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch

try:
    # The dictionary that transformers' output hooks fill during the current forward; its keys are what was asked for.
    from transformers.utils.output_capturing import _active_collector
except ImportError:  # pragma: no cover - older releases pass output_attentions down as an argument
    _active_collector = None

_collected: WeakKeyDictionary[Any, bool] = WeakKeyDictionary()
"""By module, whether a hook waited for maps in its last forward: checkpointing recomputes after the hook is gone."""


def wants_maps(module: Any, config: Any = None, options: dict[str, Any] | None = None) -> bool:
    """By argument, by configuration, or by an output hook that waits for attention maps.

    A pass that checkpointing recomputes gets the answer of the pass that it recomputes.
    """
    asked = (options or {}).get("output_attentions")
    if asked if asked is not None else getattr(config, "output_attentions", False):
        return True
    if _active_collector is None or torch.compiler.is_compiling():
        return False
    if torch._C._current_graph_task_id() == -1:  # no backward pass is running
        _collected[module] = any("attentions" in name for name in _active_collector.get() or ())
    return _collected.get(module, False)
