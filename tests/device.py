"""The tests of GPU kernels on a GPU where there is one: tensors travel there, results and gradients come back."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._pytree import tree_map_only

from fastxattn.runtime import native, triton

PRESENT = torch.cuda.is_available()
BACKENDS = ("triton", "cuda") if PRESENT and native.cuda_library().reason is None else ("triton",)
"""Whose kernels can be tested: in Triton's interpreter its own, on a device both."""
RUNS = PRESENT or triton.interpreted()
WHY_NOT = "needs a GPU, or TRITON_INTERPRET=1 (make test-interpreted)"


def there(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function``, computed on the GPU when it is called with one of BACKENDS and there is one."""

    @functools.wraps(function)
    def call(*arguments: Any, **options: Any) -> Any:
        if not PRESENT or options.get("backend") not in BACKENDS:
            return function(*arguments, **options)
        moved: dict[int, torch.Tensor] = {}  # a tensor given twice stays one tensor

        def move(t: torch.Tensor) -> torch.Tensor:
            return moved.setdefault(id(t), t.to("cuda"))

        arguments, options = tree_map_only(torch.Tensor, move, (arguments, options))
        return tree_map_only(torch.Tensor, lambda t: t.cpu(), function(*arguments, **options))

    return call
