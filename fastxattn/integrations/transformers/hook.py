"""Adapter of models that go through transformers' attention interface: switches their configuration to fastxattn."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, ClassVar

from torch import nn

from fastxattn.integrations.swap import Adapter
from fastxattn.integrations.transformers import IMPLEMENTATION, register, unsupported

register()  # also when a pickled model is loaded in a process that never called accelerate()

_BEFORE = "_fastxattn_attn_implementation"


class AttentionHook(Adapter):
    """A ``PreTrainedModel`` whose attention modules read ``config._attn_implementation``."""

    does: ClassVar[str] = "attention function and masks through transformers' attention interface"

    def save_pretrained(self, *args: Any, **kwargs: Any) -> Any:
        """As the original's, which refuses to save output_attentions beside an implementation of another name."""
        with _before_the_swap(self):  # type: ignore[arg-type]
            return super().save_pretrained(*args, **kwargs)  # type: ignore[misc]

    @classmethod
    def refuses(cls, module: nn.Module, parent: nn.Module | None) -> str | None:
        """Refuse models that need another implementation."""
        if reason := unsupported(module):
            return reason
        current = module.config._attn_implementation  # type: ignore
        if current not in (None, "eager", "sdpa", IMPLEMENTATION):
            return f"its attn_implementation is {current!r}, chosen on purpose; set 'sdpa' first"
        return None

    @classmethod
    def swapped(cls, module: nn.Module) -> None:
        """Remember the implementations and set fastxattn's."""
        # Several modules can share one configuration: each remembers what it found, the first one the original.
        vars(module)[_BEFORE] = {name: c._attn_implementation for name, c in _configurations(module).items()}
        for config in _configurations(module).values():
            config._attn_implementation_internal = IMPLEMENTATION

    @classmethod
    def restored(cls, module: nn.Module) -> None:
        """Set the remembered implementations."""
        for name, before in vars(module).pop(_BEFORE, {}).items():
            if before != IMPLEMENTATION:
                module.get_submodule(name).config._attn_implementation_internal = before  # type: ignore


@contextlib.contextmanager
def _before_the_swap(model: nn.Module) -> Iterator[None]:
    """Inside, configurations name the implementations that they named before the swap."""
    changed = []
    for module in model.modules():
        for name, before in vars(module).get(_BEFORE, {}).items():
            if before != IMPLEMENTATION:
                changed.append(module.get_submodule(name).config)
                changed[-1]._attn_implementation_internal = before  # type: ignore
    try:
        yield
    finally:
        for config in changed:
            config._attn_implementation_internal = IMPLEMENTATION  # type: ignore


def _configurations(model: nn.Module) -> dict[str, Any]:
    """The configurations that layers of ``model`` read, by module: its own, and those that no other model has.

    CLIPSeg's decoder layers read a copy, and SAM 2's mask decoder is no model of its own.
    """
    models = {name for name, m in model.named_modules() if hasattr(type(m), "set_attn_implementation")}
    known = {id(model.get_submodule(name).config) for name in models}
    found: dict[str, Any] = {"": model.config}
    for name, module in model.named_modules():
        config = getattr(module, "config", None)
        if id(config) in known or getattr(config, "_attn_implementation", "flash") not in (None, "eager", "sdpa"):
            continue
        if not any(name.startswith(f"{other}.") for other in models if other):
            known.add(id(config))
            found[name] = config
    return found
