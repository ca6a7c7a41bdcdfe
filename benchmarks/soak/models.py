"""Small models of the real classes with random weights: the swapped model against the original."""

from __future__ import annotations

import copy
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks.soak.trials import Draw, Trial
from fastxattn.integrations import accelerate, core


def model(d: Draw) -> Trial:
    """One of the models that the tests of the swap know: its outputs, and the gradients of its inputs and parameters.

    16-bit rounding moves some pre-activation of a ReLU across 0, which switches a whole row of gradients on or off, in
    either implementation: gradients are compared in float32.
    """
    from tests.integrations.zoo import ENTRIES  # imports transformers, which takes seconds

    entry = d.of(*ENTRIES)
    with torch.random.fork_rng():
        torch.manual_seed(d.r.randrange(1 << 30))
        built, arguments, _ = entry.build()
    built.eval()
    inputs = {f"input {n}": t.to(d.dtype) for n, t in arguments.items() if _is_float(t)}
    inputs |= {f"parameter {n}": p.detach().to(d.dtype) for n, p in built.named_parameters()}

    def run(x: dict[str, Tensor], backend: str) -> Any:
        own = {n.removeprefix("parameter "): t for n, t in x.items() if n.startswith("parameter ")}
        given = {n: x[f"input {n}"] if _is_float(t) else t for n, t in arguments.items()}
        module = copy.deepcopy(built).to(next(iter(own.values())).dtype)
        with torch.random.fork_rng(), mock.patch.object(core, "SMALL", 0):  # even what is too small to gain is swapped
            if backend != "reference":
                accelerate(module)
            torch.manual_seed(1)  # ViLT samples patches
            return tuple(entry.keep(torch.func.functional_call(module, own, kwargs=given)))

    return Trial(entry.name, d.dtype, inputs, run, gradients=d.dtype == torch.float32)


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()
