"""Keys and values of images, computed once for all decoding steps (and all prompts) that read the same features.

They are recognised by what determines them: the content of the features, and of the weights that project them. Version
counters and addresses do not: weights are updated through ``.data`` (moving averages, weight surgery), buffers are
refilled through NumPy, and a LoRA adapter is switched by an attribute. Features are compared whole. A weight is
compared by its product with a random vector, which reads it once, where a projection reads it once per few rows.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastxattn.integrations.core import plain_type


@dataclass(frozen=True)
class _Kept:
    states: Tensor
    setting: tuple[Any, ...]
    weights: list[Tensor]
    results: tuple[Tensor, Tensor]


_kept: weakref.WeakKeyDictionary[nn.Module, _Kept] = weakref.WeakKeyDictionary()
_last: list[weakref.ref[Tensor]] = []  # the features of the layer before, which are mostly this layer's too


def may_keep(module: nn.Module, states: Tensor) -> bool:
    """Whether results may outlive a call: evaluation, no gradients, no trace, and content that is cheap to read."""
    return not (
        torch.is_grad_enabled()
        or module.training
        or states.device.type != "cpu"
        or torch.compiler.is_compiling()
        or torch._C._functorch.maybe_current_level() is not None
    )


def once(
    module: nn.Module,
    layers: Iterable[nn.Module],
    states: Tensor,
    project: Callable[[Tensor], tuple[Tensor, Tensor]],
) -> tuple[Tensor, Tensor]:
    """``project(states)``, keys and values, kept until the states or the ``layers`` that project change.

    Nothing is kept of layers whose result depends on more than their parameters: adapters (LoRA), parametrised,
    quantised and replaced layers. A forward hook is assumed to return the same for the same input.
    """
    layers = list(layers)
    if not all(_settled(layer) for layer in layers):
        return project(states)
    hooks = [id(h) for m in layers for h in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())]
    setting = (torch.is_autocast_enabled("cpu"), torch.is_inference_mode_enabled(), *hooks)
    weights = [_fingerprint(p) for layer in layers for p in layer.parameters()]
    kept = _kept.get(module)
    same = kept is not None and kept.setting == setting and _equal(kept.states, states)
    if kept is None or not same or not all(map(_equal, kept.weights, weights)):
        kept = _Kept(_copy(states), setting, weights, project(states))
        _kept[module] = kept
    return kept.results


def forget(model: nn.Module) -> None:
    """Free the keys and values that the modules of ``model`` keep."""
    for module in model.modules():
        _kept.pop(module, None)


def _settled(layer: nn.Module) -> bool:
    """Whether parameters alone determine what ``layer`` computes: an ``nn.Linear``, or a norm."""
    parameters = list(layer.parameters())
    norm = all(p.ndim == 1 for p in parameters) and type(layer).__module__.startswith(("torch.nn.", "transformers."))
    return (
        (plain_type(layer) or norm)
        and "forward" not in vars(layer)
        and next(layer.children(), None) is None
        and all(p.dtype in (torch.float32, torch.float64) for p in parameters)
        and all(p.device.type == "cpu" and type(p) in (nn.Parameter, Tensor) for p in parameters)
    )


def _fingerprint(parameter: Tensor) -> Tensor:
    return parameter.clone() if parameter.ndim < 2 else parameter @ _probe(parameter.shape[-1], parameter.dtype)


@functools.lru_cache
def _probe(size: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(size, dtype=dtype, generator=torch.Generator().manual_seed(size))


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a, b)


def _copy(states: Tensor) -> Tensor:
    """A copy of the features, one for all layers that read them."""
    last = _last[0]() if _last else None
    if last is None or not _equal(last, states):
        last = states.clone()
        _last[:] = [weakref.ref(last)]
    return last
