"""A module as ONNX sees it: named tensors in, named tensors out."""

from __future__ import annotations

import builtins
import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
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


def is_packed(x: Any) -> bool:
    """Whether ``x`` is a PackedTokens."""
    return isinstance(x, PackedTokens)


def name_leaves(tree: Any, is_leaf: Callable[[Any], bool] | None = None) -> list[tuple[str, Any]]:
    """(name, leaf) in pytree order; a name is the path to the leaf, joined by underscores, and occurs once."""
    paths, _ = pytree.tree_flatten_with_path(tree, is_leaf=is_leaf)

    def part(key: Any) -> str:
        for field in ("key", "name", "idx"):
            if hasattr(key, field):
                return str(getattr(key, field))
        return str(key)

    taken: set[str] = set()
    return [(free("_".join(map(part, path)), taken), leaf) for path, leaf in paths]


def free(name: str, taken: set[str]) -> str:
    """``name``, with a number where it is taken; it is taken afterwards."""
    found = next(n for n in (name, *(f"{name}_{i}" for i in range(2, len(taken) + 3))) if n not in taken)
    taken.add(found)
    return found


def tensors(named: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensor leaves of named arguments, by the names that the graph's inputs get."""
    return {name: leaf for name, leaf in name_leaves(dict(named)) if isinstance(leaf, Tensor)}


def tensors_of(module: torch.nn.Module, inputs: tuple[Any, Any]) -> list[Tensor]:
    """The tensors that the graph takes for these arguments, in its order."""
    args, kwargs = inputs
    return list(tensors(bind(module, args, kwargs)).values())


def evaluate(module: torch.nn.Module, inputs: tuple[Any, Any]) -> dict[str, Tensor]:
    """The module's outputs by name, as the graph gives them."""
    args, kwargs = inputs
    flat = Flat(module, args, kwargs)
    with torch.no_grad():
        results = flat(*tensors_of(module, inputs))
    return dict(zip(flat.traced.output_names, results, strict=True))


def in_double(inputs: Any) -> Any:
    """``inputs`` with floating-point tensors in float64."""
    return pytree.tree_map(lambda x: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x, inputs)


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
        args, kwargs = pytree.tree_map(_measure, pytree.tree_unflatten(full, self._spec), is_leaf=is_packed)
        result = self.module(*args, **kwargs)
        named = [(name or "output", leaf) for name, leaf in name_leaves(result) if isinstance(leaf, Tensor)]
        taken: set[str] = set()
        names = [free(f"output_{name}" if name[0].isdigit() else name, taken) for name, _ in named]
        self.traced.output_names = names
        return tuple(leaf for _, leaf in named)


def _measure(tokens: Any) -> Any:
    if not is_packed(tokens):
        return tokens
    # A leading 0 gives an empty batch a longest length.
    longest = torch.cat([tokens.cu_seqlens.new_zeros(1), tokens.cu_seqlens.diff()]).max().item()
    if torch.compiler.is_compiling():
        torch._check(longest >= 0)
    measured = object.__new__(PackedTokens)
    for name, value in (("values", tokens.values), ("cu_seqlens", tokens.cu_seqlens), ("max_seqlen", longest)):
        object.__setattr__(measured, name, value)
    return measured


@contextlib.contextmanager
def open_lengths() -> Iterator[None]:
    """While tracing, ``len(tensor)`` stays a symbol, and torch's fused encoder layers take their plain form.

    The builtin must return an int, which makes a tracer keep the example's size. An ordinary tensor's length is
    unchanged, so that other threads see no difference.
    """
    original, fast = builtins.len, torch.backends.mha.get_fastpath_enabled()

    def length(x: Any, /) -> Any:
        return x.shape[0] if isinstance(x, Tensor) and x.ndim else original(x)

    builtins.len = length
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        builtins.len = original
        torch.backends.mha.set_fastpath_enabled(fast)
