"""The proof behind ``accelerate(verify=inputs)``: error against float64, and time against the original."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fastxattn.integrations.report import Verification
from fastxattn.integrations.swap import unswap
from fastxattn.runtime.timing import interleaved

# Timing noise on a quiet machine; a model that is slower by more than this is given back.
SLOWER = 0.97


def verify_swap(model: nn.Module, inputs: Any, set_swapped: Callable[[bool], None], rounds: int = 7) -> Verification:
    """Run and time ``model`` swapped and not, against a float64 copy of the original.

    The budget is the design's: twice the original's error in its own dtype, plus what rounding the result costs.
    """
    with _evaluation(model), torch.no_grad(), _same_random_numbers():
        set_swapped(False)
        original = _tensors(call(model, inputs))
        wide_model = copy.deepcopy(model).double()
        for module in wide_model.modules():
            unswap(module)
        reference = _tensors(call(wide_model, _double(inputs)))
        del wide_model
        set_swapped(True)
        ours = _tensors(call(model, inputs))
        error, eager_error, budget, same = _compare(ours, original, reference)

        def timed(on: bool) -> None:
            set_swapped(on)
            call(model, inputs)

        timing = interleaved({"original": lambda: timed(False), "accelerated": lambda: timed(True)}, rounds=rounds)
    speedup = timing["accelerated"].ratio_to(timing["original"])
    reason = ""
    if not same or not error <= budget:
        reason = f"the error {error:.3g} exceeds the budget {budget:.3g}"
    elif speedup < SLOWER:
        reason = f"the model became slower ({speedup:.2f}x) on these inputs"
    return Verification(
        error,
        eager_error,
        budget,
        speedup,
        timing["original"].median * 1e3,
        timing["accelerated"].median * 1e3,
        kept=not reason,
        reason=reason,
    )


def call(model: nn.Module, inputs: Any) -> Any:
    """``model`` on a dict of keyword arguments or a tuple of positional ones."""
    return model(**inputs) if isinstance(inputs, dict) else model(*inputs)


def _compare(ours: list[Tensor], original: list[Tensor], reference: list[Tensor]) -> tuple[float, float, float, bool]:
    worst, eager, budget, same = 0.0, 0.0, 0.0, len(ours) == len(original) == len(reference)
    for a, b, ref in zip(ours, original, reference, strict=False):
        same = same and a.shape == b.shape and bool((a.isfinite() == b.isfinite()).all())
        if not same or a.numel() == 0:
            continue
        finite = ref.isfinite() & b.isfinite()
        wide, rounded = ref[finite].double(), ref[finite].to(a.dtype)
        if wide.numel() == 0:
            continue
        floor = 2 * ((rounded + 0.3 - 0.3).double() - rounded.double()).abs().max().item()
        mine = (a[finite].double() - wide).abs().max().item()
        theirs = (b[finite].double() - wide).abs().max().item()
        if mine / max(2 * theirs + floor, 1e-300) >= worst / max(budget, 1e-300):
            worst, eager, budget = mine, theirs, 2 * theirs + floor
    return worst, eager, budget, same


def _tensors(output: Any) -> list[Tensor]:
    """The floating-point tensors of an output's first level: nested outputs are what the result was made from."""
    if isinstance(output, Tensor):
        output = [output]
    values = output.values() if hasattr(output, "values") else output
    found = []
    for value in values:
        plain = value if isinstance(value, (Tensor, tuple, list)) else None
        found += [t for t in pytree.tree_leaves(plain) if isinstance(t, Tensor) and t.is_floating_point()]
    return found


def _double(inputs: Any) -> Any:
    return pytree.tree_map(lambda x: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x, inputs)


@contextlib.contextmanager
def _evaluation(model: nn.Module) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextlib.contextmanager
def _same_random_numbers() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        yield
