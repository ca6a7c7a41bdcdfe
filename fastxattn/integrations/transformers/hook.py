"""Adapter of models that go through transformers' attention interface: switches their configuration to fastxattn."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import nn

from fastxattn.integrations.swap import Adapter
from fastxattn.integrations.transformers import IMPLEMENTATION, register

register()  # also when a pickled model is loaded in a process that never called accelerate()

_BEFORE = "_fastxattn_attn_implementation"


class AttentionHook(Adapter):
    """A ``PreTrainedModel`` whose attention modules read ``config._attn_implementation``."""

    does: ClassVar[str] = "attention function and masks through transformers' attention interface"

    @classmethod
    def refuses(cls, module: nn.Module, parent: nn.Module | None) -> str | None:
        """Refuse models that need another implementation."""
        current = module.config._attn_implementation  # type: ignore
        if current not in (None, "eager", "sdpa", IMPLEMENTATION):
            return f"its attn_implementation is {current!r}, chosen on purpose; set 'sdpa' first"
        return None

    @classmethod
    def swapped(cls, module: nn.Module) -> None:
        """Remember the implementation and set fastxattn's."""
        config: Any = module.config
        # Several modules can share one configuration: each remembers what it found, the first one the original.
        vars(module)[_BEFORE] = config._attn_implementation
        config._attn_implementation_internal = IMPLEMENTATION

    @classmethod
    def restored(cls, module: nn.Module) -> None:
        """Set the remembered implementation."""
        before = vars(module).pop(_BEFORE, None)
        if before != IMPLEMENTATION:
            module.config._attn_implementation_internal = before  # type: ignore
