"""``verify``: an exported file against its module in float64, with and without the operator library."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastxattn.export.cases import Inputs, vary
from fastxattn.export.flat import Flat, bind, tensors
from fastxattn.export.session import Session

PARITY = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
"""Largest error allowed against float64, relative to the largest value of the output (at least 1)."""


@dataclass(frozen=True)
class Check:
    """One output of one run of the file."""

    case: str
    library: bool
    output: str
    error: float
    module_error: float
    """The module's own error in its dtype, beside which the file's is to be seen."""
    allowed: float
    fault: str = ""
    """Why the run counts as failed whatever the error: it raised, or returned another shape or NaN elsewhere."""

    @property
    def ok(self) -> bool:
        """Whether the run is inside its bound."""
        return not self.fault and self.error <= self.allowed


@dataclass(frozen=True)
class Verification:
    """All checks of one file; ``print`` it for a table."""

    path: Path
    checks: tuple[Check, ...]

    @property
    def ok(self) -> bool:
        """Whether every check passed."""
        return all(check.ok for check in self.checks)

    def __str__(self) -> str:
        rows = [("case", "operators", "output", "error", "module's own", "allowed", "")]
        for c in self.checks:
            verdict = "ok" if c.ok else f"FAILED {c.fault}".rstrip()
            side = "library" if c.library else "portable"
            rows.append(
                (c.case, side, c.output, f"{c.error:.1e}", f"{c.module_error:.1e}", f"{c.allowed:.1e}", verdict)
            )
        widths = [max(len(row[i]) for row in rows) for i in range(6)]
        lines = ["  ".join([*(f"{cell:<{w}}" for cell, w in zip(row, widths, strict=False)), row[6]]) for row in rows]
        failed = sum(not c.ok for c in self.checks)
        lines.append(f"{self.path}: {len(self.checks) - failed} of {len(self.checks)} checks passed")
        return "\n".join(lines)


def verify(
    path: str | Path,
    module: torch.nn.Module,
    args: Sequence[Any],
    *,
    kwargs: Mapping[str, Any] | None = None,
    cases: Mapping[str, Inputs] | None = None,
    library: Sequence[bool] = (False, True),
) -> Verification:
    """Run the file on the example and on what usually breaks (:func:`fastxattn.export.cases.vary`), and compare.

    The truth is ``module`` converted to float64. A check passes when its error, relative to the output's largest
    value (at least 1), is at most :data:`PARITY` for the dtype, or twice the module's own error in that dtype where
    that is larger; and when NaN and infinity are where the truth has them.

    Args:
        path: what :func:`fastxattn.export.to_onnx` wrote.
        module: what it was written from, in eval mode.
        args: example inputs, in the file's dtype.
        kwargs: example keyword inputs.
        cases: further inputs, by name: ``{"short": ((a, b), {})}``.
        library: which sides to run: portable bodies (False), the operator library (True).

    Example:
        >>> report = verify("model.onnx", model, (tokens,))
        >>> print(report); assert report.ok
    """
    kwargs = dict(kwargs or {})
    exact = copy.deepcopy(module).double()
    sessions = {side: Session(path, library=side) for side in library}
    checks: list[Check] = []
    for name, (a, k) in {**dict(vary(args, kwargs)), **(cases or {})}.items():
        truth, names = _run(exact, *_double((a, k)))
        own, _ = _run(module, a, k)
        inputs = tensors(bind(module, a, k))
        for side, session in sessions.items():
            try:
                results = session(**{n: inputs[n] for n in session.input_names})
            except Exception as error:
                checks.append(Check(name, side, "", float("inf"), 0.0, 0.0, f"{type(error).__name__}: {error}"))
                continue
            for output, x, t, o in zip(names, results, truth, own, strict=True):
                checks.append(_check(name, side, output, x, t, o))
    return Verification(Path(path), tuple(checks))


def _check(case: str, side: bool, output: str, got: Tensor, truth: Tensor, own: Tensor) -> Check:
    if got.shape != truth.shape:
        fault = f"shape {tuple(got.shape)}, expected {tuple(truth.shape)}"
        return Check(case, side, output, float("inf"), 0.0, 0.0, fault)
    error, module_error, size = _error(got, truth), _error(own, truth), _size(truth)
    floor = PARITY.get(got.dtype, 0.0)
    fault = "" if _same_special(got, truth) else "NaN or infinity in other places"
    return Check(case, side, output, error / size, module_error / size, max(floor, 2 * module_error / size), fault)


def _size(truth: Tensor) -> float:
    finite = truth.double()[truth.isfinite()]
    return max(1.0, finite.abs().max().item()) if finite.numel() else 1.0


def _error(x: Tensor, truth: Tensor) -> float:
    both = x.isfinite() & truth.isfinite()
    return (x.double() - truth.double())[both].abs().max().item() if bool(both.any()) else 0.0


def _same_special(x: Tensor, truth: Tensor) -> bool:
    special = ~truth.isfinite()
    return bool((x.isfinite() == ~special).all()) and torch.equal(
        x.double()[special].nan_to_num(nan=0.5), truth.double()[special].nan_to_num(nan=0.5)
    )


def _run(
    module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Tensor, ...], list[str]]:
    flat = Flat(module, args, kwargs)
    with torch.no_grad():
        result = flat(*tensors(bind(module, args, kwargs)).values())
    return result, flat.traced.output_names


def _double(inputs: Inputs) -> Inputs:
    convert = torch.utils._pytree.tree_map
    return convert(  # type: ignore[no-any-return]
        lambda x: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x, inputs
    )
