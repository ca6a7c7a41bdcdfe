"""Whether a caller asked for attention maps, which only the dense formula gives."""

from __future__ import annotations

from typing import Any

import torch

try:
    # The dictionary that transformers' output hooks fill during the current forward; its keys are what was asked for.
    from transformers.utils.output_capturing import _active_collector
except ImportError:  # pragma: no cover - older releases pass output_attentions down as an argument
    _active_collector = None


def wants_maps(config: Any = None, options: dict[str, Any] | None = None) -> bool:
    """By argument, by configuration, or by an output hook that waits for attention maps."""
    asked = (options or {}).get("output_attentions")
    if asked if asked is not None else getattr(config, "output_attentions", False):
        return True
    if _active_collector is None or torch.compiler.is_compiling():
        return False
    return any("attentions" in name for name in _active_collector.get() or ())
