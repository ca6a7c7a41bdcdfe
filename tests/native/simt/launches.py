"""Launches of the CUDA library's operators, run by the SIMT runner instead: host code and kernels together on a CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from simt.build import Simt

from fastxattn.runtime import cuda

SIDES = "x y scale bias norm_x norm_y id_x id_y skip_x skip_y exact"
GRADIENT = "x y cu_x cu_y set_x set_y best_x best_y grad_x grad_y stride_x stride_y"
# By name: arguments of the operator (csrc/<op>/<op>_cuda_torch.cpp) under the names of tests/native/simt/bind_<op>.cpp.
ARGUMENTS = {
    "pruning_select": ("select", "keep_index assignment gathered scores cu cu_keep protected x aligned shares"),
    "pruning_match": ("match", "best similarity x inverse_norm a_index cu_a b_index cu_b aligned shares"),
    "pruning_merge": ("merge", "out x members first coefficient"),
    "maxsim": ("maxsim", "sum_a sum_b best_a best_b a b cu_a cu_b smooth aligned"),
    "maxsim_gradient": ("maxsim_gradient", f"out {GRADIENT} aligned"),
    "smooth_weights": ("smooth_weights", f"weights {GRADIENT} smooth first_x first_y rows columns aligned"),
    "contrastive_stats": (
        "contrastive_stats",
        f"state {SIDES} limit_x rank exact_by_row exclude_self means aligned",
    ),
    "contrastive_positives": ("contrastive_positives", "logits x y scale bias norm_x norm_y target aligned"),
    "contrastive_slopes": (
        "contrastive_slopes",
        f"dz sums {SIDES} limit_x limit_y slopes_x slopes_y exclude_self first_x first_y rows columns aligned",
    ),
    "sigmoid": (
        "sigmoid",
        f"dz sums {SIDES} weight exclude_self first_x first_y rows columns aligned",
    ),
}


def as_array(value: Any) -> Any:
    """A NumPy view of a tensor's memory; 16-bit floats as uint16."""
    if not isinstance(value, torch.Tensor):
        return value
    value = value.detach().reshape(1) if value.dim() == 0 else value.detach()
    floats16 = value.dtype in (torch.float16, torch.bfloat16)
    return value.view(torch.int16).numpy().view(np.uint16) if floats16 else value.numpy()


def launcher(simt: Simt) -> Callable[..., None]:
    """What stands for fastxattn.runtime.cuda.launch."""

    def launch(name: str, *arguments: Any) -> None:
        bound, names = ARGUMENTS[name]
        given = dict(zip(names.split(), arguments, strict=True))
        if "splits" not in given and "state" in given:
            given["splits"] = given["state"].shape[0]
        dtypes = [t.dtype for key in ("x", "a") if isinstance(t := given.get(key), torch.Tensor)]
        typed = "" if bound == "select" else f"_{str(dtypes[0]).removeprefix('torch.')}"
        getattr(simt, bound + typed)(**{key: as_array(value) for key, value in given.items()})

    return launch


@contextmanager
def on_simt(simt: Simt, monkeypatch: Any, *functions: Callable[..., Any]) -> Iterator[None]:
    """Make ``<function>_cuda`` operators take CPU tensors, and their launches go to the runner."""
    monkeypatch.setattr(cuda, "launch", launcher(simt))
    library = torch.library.Library("fastxattn", "IMPL")
    try:
        for prefix, function in functions:
            library.impl(f"{prefix}{function.__name__}_cuda", function, "CPU")
        yield
    finally:
        library._destroy()
