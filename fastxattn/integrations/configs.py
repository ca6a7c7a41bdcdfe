"""Configurations of a swapped model: copies of its own, so that nothing else built from them changes.

Models of transformers read the attention implementation from a configuration object, which submodules, and other
models built from the same object, share.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

from torch import nn

from fastxattn.integrations.swap import adapter_of


def is_pretrained(module: nn.Module) -> bool:
    """Whether ``module`` is a model of transformers, with a configuration."""
    return hasattr(type(module), "set_attn_implementation") and is_config(getattr(module, "config", None))


def is_config(value: Any) -> bool:
    """Whether ``value`` is a configuration that says which attention to run."""
    return "_attn_implementation_internal" in getattr(value, "__dict__", ())


class Owned:
    """Gives the swapped parts of ``model`` copies of their configurations; :meth:`undo` gives the originals back.

    Excluded modules, and models inside that are not swapped, keep the object they have. The configuration of a model
    around a swapped one gets the swapped one's copy as its part, because such a model makes masks for it.
    """

    def __init__(self, model: nn.Module, swapped: set[int], excluded: set[int]) -> None:
        self._before: list[tuple[nn.Module, str, Any]] = []
        self._own: dict[int, Any] = {}
        self._foreign: list[tuple[Any, Any]] = []
        around: list[nn.Module] = []
        for module, inside in _regions(model, swapped, excluded):
            if inside:
                for name, config in _configs(module):
                    self._set(module, name, config, copy.deepcopy(config, self._own))
                continue
            self._foreign += [(config, config._attn_implementation) for _, config in _configs(module)]
            if is_pretrained(module):
                around.append(module)
        for module in around:
            for name, config in _configs(module):
                parts = {k: self._own[id(v)] for k, v in vars(config).items() if is_config(v) and id(v) in self._own}
                if parts:
                    outer = copy.copy(config)
                    vars(outer).update(parts)
                    self._set(module, name, config, outer)

    def _set(self, module: nn.Module, name: str, before: Any, after: Any) -> None:
        self._before.append((module, name, before))
        setattr(module, name, after)

    def settle(self) -> None:
        """After a swap: what is not swapped keeps its attention function, even where an adapter reached it."""
        for config, chosen in self._foreign:
            config._attn_implementation_internal = chosen

    def undo(self) -> None:
        """Give every module the configuration that it had."""
        for module, name, config in self._before:
            setattr(module, name, config)


def _configs(module: nn.Module) -> list[tuple[str, Any]]:
    return [(name, value) for name, value in vars(module).items() if is_config(value)]


def _regions(model: nn.Module, swapped: set[int], excluded: set[int]) -> Iterator[tuple[nn.Module, bool]]:
    """Every module of a tree, and whether it reads the configuration of a swapped model."""
    seen: set[int] = set()
    stack = [(model, False)]
    while stack:
        module, inside = stack.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        if id(module) in excluded:
            inside = False
        elif is_pretrained(module):
            inside = id(module) in swapped or adapter_of(module) is not None
        yield module, inside
        stack += [(child, inside) for child in module.children()]
