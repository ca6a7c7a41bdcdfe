"""Comparing a file's outputs with its module's."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from fastxattn.export.flat import evaluate, in_double, tensors_of
from fastxattn.export.session import Session
from fastxattn.export.sizes import Example, Inputs, Variation

PARITY = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
"""Largest error allowed against float64, relative to the largest value of the output (at least 1)."""


def size(x: Tensor) -> float:
    """The largest finite value, at least 1: what errors are relative to."""
    finite = x.double()[x.isfinite()]
    return max(1.0, finite.abs().max().item()) if finite.numel() else 1.0


def error(x: Tensor, truth: Tensor) -> float:
    """Largest difference where both are finite."""
    both = x.isfinite() & truth.isfinite()
    return (x.double() - truth.double())[both].abs().max().item() if bool(both.any()) else 0.0


def same_special(x: Tensor, truth: Tensor) -> bool:
    """Whether NaN and infinity are in the same places."""
    special = ~truth.isfinite()
    return bool((x.isfinite() == ~special).all()) and torch.equal(
        x.double()[special].nan_to_num(nan=0.5), truth.double()[special].nan_to_num(nan=0.5)
    )


def trimmed(got: Tensor, expected: Tensor) -> Tensor:
    """``got`` without trailing rows of padding: 0 in values, -1 in indices.

    In a graph, the rows that a selection keeps have the size of the budget's bound; eagerly the exact one.
    """
    rows = expected.shape[0] if expected.ndim else 0
    if got.ndim != expected.ndim or got.ndim == 0 or got.shape[0] <= rows:
        return got
    rest = got[rows:]
    return got[:rows] if bool((rest == (0 if rest.is_floating_point() else -1)).all()) else got


def check_sizes(
    path: Path, module: torch.nn.Module, inputs: Inputs, traced: Example, *, bounded: bool
) -> tuple[str, ...]:
    """Compare the file with its module on the example and at other sizes; return what was compared.

    Args:
        path: the file.
        module: what it was made from.
        inputs: the caller's example.
        traced: the example that was traced.
        bounded: results of a selection have as many rows as its budget allows.

    Raises:
        ValueError: the file fails or errs where the module does not; the message names the axis.
    """
    first, again = evaluate(module, inputs), evaluate(module, inputs)
    if not all(
        torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(first.values(), again.values(), strict=True)
    ):
        raise ValueError("the module gives different results for the same inputs: a file cannot be compared with it")
    sessions = _sessions(path)
    done: list[str] = []
    same = (("the example", inputs), ("the example made larger", traced.resized({})))
    for case in (*(Variation(title, x, True) for title, x in same), *traced.variations()) if sessions else ():
        try:
            expected = evaluate(module, case.inputs)
        except Exception:
            continue  # a size that the module does not take
        given = tensors_of(module, case.inputs)
        for side, session in sessions.items():
            if case.widths and not session.takes(given):
                break
            try:
                results = session(*given)
            except Exception as failed:
                if not case.consistent:
                    break
                fault = f"{type(failed).__name__}: {str(failed).strip().splitlines()[-1][-200:]}"
            else:
                fault = _fault(module, case.inputs, expected, results, bounded)
            if fault:
                raise ValueError(
                    f"the file {side} is wrong for {case.title}: {fault}. A size of the example was kept, by a Python "
                    "branch on a size or by torch's exporter; write the module without it, or fix the axis on purpose: "
                    "dynamic={'input': {axis: False}}. Nothing was written"
                )
        else:
            done.append(case.title)
    return tuple(done)


def _sessions(path: Path) -> Mapping[str, Session]:
    sessions = {}
    for side, library in (("with portable bodies", False), ("with the operator library", True)):
        try:
            sessions[side] = Session(path, library=library)
        except FileNotFoundError:
            continue  # built without the library
        except Exception as refused:
            if "NOT_IMPLEMENTED" not in str(refused):
                raise ValueError(f"the file does not load {side}: {refused}. Nothing was written") from refused
            warnings.warn(f"the file was not compared with the module: {refused}", stacklevel=4)
    return sessions


def _fault(
    module: torch.nn.Module, inputs: Inputs, expected: Mapping[str, Tensor], results: Sequence[Tensor], bounded: bool
) -> str:
    truth: Mapping[str, Tensor] | None = None
    for (name, own), given in zip(expected.items(), results, strict=True):
        got = trimmed(given, own) if bounded else given
        if got.shape != own.shape:
            return f"output {name} has shape {tuple(got.shape)} instead of {tuple(own.shape)}"
        if not same_special(got, own):
            return f"output {name} has NaN or infinity in other places"
        relative = error(got, own) / size(own)
        if relative <= 4 * PARITY.get(own.dtype, 0.0):
            continue
        # Rounding in a deep module: what the module itself loses against float64 is allowed twice.
        if truth is None:
            truth = evaluate(copy.deepcopy(module).double(), in_double(inputs))
        lost = error(own, truth[name]) / size(own)
        if not relative <= 3 * lost:
            return f"output {name} differs by {relative:.1e}, the module itself by {lost:.1e} from float64"
    return ""
