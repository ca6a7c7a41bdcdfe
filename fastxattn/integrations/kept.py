"""Keys and values of images, computed once for all decoding steps (and all prompts) that read the same features."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

_Kept = tuple[Tensor, tuple[Any, ...], Tensor, Tensor]
_kept: weakref.WeakKeyDictionary[nn.Module, _Kept] = weakref.WeakKeyDictionary()


def may_keep(module: nn.Module, states: Tensor) -> bool:
    """Whether results may outlive a call: evaluation, no gradients, tensors with version counters, no trace."""
    return not (torch.is_grad_enabled() or module.training or states.is_inference() or torch.compiler.is_compiling())


def once(
    module: nn.Module, states: Tensor, project: Callable[[Tensor], tuple[Tensor, Tensor]]
) -> tuple[Tensor, Tensor]:
    """``project(states)``, keys and values, kept until other states or other weights of ``module`` come.

    The states are recognised by their memory, which the entry keeps alive and which therefore cannot be anyone
    else's, and by torch's version counters: every decoding step passes a new view of the same tensor.
    """
    stamp = (
        *(states.data_ptr(), states.shape, states.stride(), states.dtype, states._version),
        *((p.data_ptr(), p._version) for p in module.parameters()),
        torch.is_autocast_enabled(states.device.type),
    )
    kept = _kept.get(module)
    if kept is None or kept[1] != stamp:
        kept = (states, stamp, *project(states))
        _kept[module] = kept
    return kept[2], kept[3]


def forget(model: nn.Module) -> None:
    """Free the keys and values that the modules of ``model`` keep."""
    for module in model.modules():
        _kept.pop(module, None)
