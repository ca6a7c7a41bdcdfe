"""``verify``: an exported file against its module in float64, with and without the operator library."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastxattn.export.cases import vary
from fastxattn.export.flat import evaluate, in_double, tensors_of
from fastxattn.export.parity import PARITY, error, same_special, size, trimmed
from fastxattn.export.session import Session
from fastxattn.export.sizes import Inputs


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
    for name, inputs in {**dict(vary(args, kwargs)), **(cases or {})}.items():
        truth, own = evaluate(exact, in_double(inputs)), evaluate(module, inputs)
        for side, session in sessions.items():
            try:
                # By place: the file's inputs may have names of their own.
                results = session(*tensors_of(module, inputs))
            except Exception as failed:
                checks.append(Check(name, side, "", float("inf"), 0.0, 0.0, f"{type(failed).__name__}: {failed}"))
                continue
            for output, x in zip(own, results, strict=True):
                checks.append(_check(name, side, output, x, truth[output], own[output]))
    return Verification(Path(path), tuple(checks))


def _check(case: str, side: bool, output: str, given: Tensor, truth: Tensor, own: Tensor) -> Check:
    got = trimmed(given, own)
    if got.shape != truth.shape:
        fault = f"shape {tuple(got.shape)}, expected {tuple(truth.shape)}"
        return Check(case, side, output, float("inf"), 0.0, 0.0, fault)
    # Where only float64 gives NaN (a row without keys, in torch's attention), the module in its own dtype decides.
    truth = torch.where(truth.isnan() & own.isfinite(), own.to(truth.dtype), truth)
    off, module_off, scale = error(got, truth), error(own, truth), size(truth)
    fault = "" if same_special(got, truth) else "NaN or infinity in other places"
    allowed = max(PARITY.get(got.dtype, 0.0), 2 * module_off / scale)
    return Check(case, side, output, off / scale, module_off / scale, allowed, fault)
