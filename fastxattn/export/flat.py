"""A module as ONNX sees it: named tensors in, named tensors out."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fastxattn.packed import PackedTokens


def bind(module: torch.nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments by parameter name, those that were not given left out."""
    bound = inspect.signature(module.forward).bind(*args, **kwargs)
    named: dict[str, Any] = {}
    for name, value in bound.arguments.items():
        kind = bound.signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_KEYWORD:
            named.update(value)
        elif kind is inspect.Parameter.VAR_POSITIONAL:
            named.update({f"{name}_{i}": v for i, v in enumerate(value)})
        else:
            named[name] = value
    return named


def name_leaves(tree: Any, prefix: str = "") -> list[tuple[str, Any]]:
    """(name, leaf) in pytree order; a name is the path to the leaf, joined by underscores."""
    paths, _ = pytree.tree_flatten_with_path(tree)

    def part(key: Any) -> str:
        for field in ("key", "name", "idx"):
            if hasattr(key, field):
                return str(getattr(key, field))
        return str(key)

    return [("_".join(([prefix] if prefix else []) + [part(k) for k in path]), leaf) for path, leaf in paths]


def tensors(named: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensor leaves of named arguments, by the names that the graph's inputs get."""
    return {name: leaf for name, leaf in name_leaves(dict(named)) if isinstance(leaf, Tensor)}


class Flat(torch.nn.Module):
    """``module`` as a function of its tensor leaves, returning a tuple of tensors.

    The longest length that a PackedTokens carries is computed from its offsets, so that the example's is not baked in.
    """

    def __init__(self, module: torch.nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        super().__init__()
        self.module = module
        parameters = inspect.signature(module.forward).bind(*args, **kwargs)
        self._leaves, self._spec = pytree.tree_flatten((parameters.args, parameters.kwargs))
        self._is_tensor = [isinstance(leaf, Tensor) for leaf in self._leaves]
        self._constants = [None if t else leaf for t, leaf in zip(self._is_tensor, self._leaves, strict=True)]
        # Not a plain list: torch.export puts a module's own containers back as they were before the trace.
        self.traced = SimpleNamespace(output_names=[])

    def forward(self, *leaves: Tensor) -> tuple[Tensor, ...]:
        """Rebuild the arguments, run, flatten the result."""
        given = iter(leaves)
        full = [next(given) if t else c for t, c in zip(self._is_tensor, self._constants, strict=True)]
        args, kwargs = pytree.tree_map(
            _measure, pytree.tree_unflatten(full, self._spec), is_leaf=lambda x: isinstance(x, PackedTokens)
        )
        result = self.module(*args, **kwargs)
        named = [(name, leaf) for name, leaf in name_leaves(result) if isinstance(leaf, Tensor)]
        names = [name or "output" for name, _ in named]
        self.traced.output_names = [f"output_{name}" if name.isdigit() else name for name in names]
        return tuple(leaf for _, leaf in named)


def _measure(tokens: Any) -> Any:
    if not isinstance(tokens, PackedTokens):
        return tokens
    # A leading 0 gives an empty batch a longest length.
    longest = torch.cat([tokens.cu_seqlens.new_zeros(1), tokens.cu_seqlens.diff()]).max().item()
    if torch.compiler.is_compiling():
        torch._check(longest >= 0)
    measured = object.__new__(PackedTokens)
    for name, value in (("values", tokens.values), ("cu_seqlens", tokens.cu_seqlens), ("max_seqlen", longest)):
        object.__setattr__(measured, name, value)
    return measured
