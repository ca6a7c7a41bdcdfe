"""Modules that reduce gradients over ranks in the backward pass, and passes in which they wait with it."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree


@contextmanager
def reducers_called(encoder: Any) -> Iterator[dict[nn.Module, None]]:
    """The modules that reduce gradients and that ``encoder`` calls inside the context, in order.

    These are DistributedDataParallel, FSDP and whatever else has their ``no_sync`` or ``set_requires_gradient_sync``.
    """
    called: dict[nn.Module, None] = {}
    candidates: dict[nn.Module, None] = {}
    for thing in _held(encoder):
        if isinstance(thing, nn.Module):
            _collect(thing, candidates)

    def noted(module: nn.Module, _: Any) -> None:
        called[module] = None

    with ExitStack() as stack:
        for module in candidates:
            stack.callback(module.register_forward_pre_hook(noted).remove)
        yield called


def _held(thing: Any) -> Iterator[Any]:
    """An encoder, and what it refers to directly: by closure, global name, default argument or attribute."""
    if isinstance(thing, functools.partial):
        for inner in (thing.func, *thing.args, *thing.keywords.values()):
            yield from _held(inner)
    elif inspect.ismethod(thing):
        yield from (thing.__self__, *getattr(thing.__self__, "__dict__", {}).values())
    elif inspect.isfunction(thing):
        names = inspect.getclosurevars(thing)
        defaults = (*(thing.__defaults__ or ()), *(thing.__kwdefaults__ or {}).values())
        for inner in (*names.nonlocals.values(), *names.globals.values(), *defaults):
            yield from (inner, *getattr(inner, "__dict__", {}).values())
    else:
        yield from (thing, *getattr(thing, "__dict__", {}).values())


def _collect(module: nn.Module, found: dict[nn.Module, None]) -> None:
    """The outermost ones. The class is asked, as wrappers such as torch.compile's pass on attributes."""
    if any(hasattr(type(module), name) for name in ("no_sync", "set_requires_gradient_sync")):
        found[module] = None
        return
    for child in module.children():
        _collect(child, found)


@contextmanager
def outputs_of(modules: Sequence[nn.Module]) -> Iterator[dict[nn.Module, list[Any]]]:
    """What each of the modules returns inside the context, call by call."""
    outputs: dict[nn.Module, list[Any]] = {module: [] for module in modules}
    with ExitStack() as stack:
        for module in modules:
            stack.callback(module.register_forward_hook(lambda m, _, output: outputs[m].append(output)).remove)
        yield outputs


def computed_from(results: Sequence[Tensor], outputs: Any) -> bool:
    """Whether the graph of ``results`` contains a tensor of ``outputs``; also true when these hold no tensor."""
    tensors = [x for x in pytree.tree_leaves(outputs) if isinstance(x, Tensor)]
    wanted = {x.grad_fn for x in tensors if x.grad_fn is not None}
    seen: set[Any] = set()
    nodes = [x.grad_fn for x in results if x.grad_fn is not None]
    while nodes:
        node = nodes.pop()
        if node not in seen:
            seen.add(node)
            nodes += [source for source, _ in node.next_functions if source is not None]
    return not tensors or bool(wanted & seen)


@contextmanager
def unsynchronised(modules: Sequence[Any]) -> Iterator[None]:
    """Forward and backward passes whose gradients stay on this rank, until a pass outside reduces them all."""
    with ExitStack() as stack:
        for module in dict.fromkeys(modules):
            if hasattr(module, "no_sync"):
                stack.enter_context(module.no_sync())
            else:
                module.set_requires_gradient_sync(False)
                on: Callable[[bool], None] = module.set_requires_gradient_sync
                stack.callback(on, True)
        yield
