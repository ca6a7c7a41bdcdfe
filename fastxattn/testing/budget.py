"""The error budget that every result of every backend must keep.

Measured against a float64 reference on the rounded inputs, with plain PyTorch in the same dtype as the yardstick::

    max error  <= k * eager's max error + 2 * max|(ref + 0.3 - 0.3) - ref|     k = 2 forward, 3 backward
    mean error <= 1.25 * eager's mean error + eps / 4 * mean|ref|

The second terms are what rounding the result alone costs in that dtype: without them a case in which eager happens
to be exact (one key, all zeros) would ask for bitwise equality.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

MEAN_FACTOR = 1.25
FEW = 32
UNITS = 8
"""See :func:`of_few`."""


@dataclass(frozen=True)
class ErrorReport:
    """Errors of one result beside the budget they are held to."""

    name: str
    max_error: float
    max_budget: float
    mean_error: float
    mean_budget: float
    same_nonfinite: bool

    @property
    def ok(self) -> bool:
        """Whether the result is inside its budget."""
        return self.same_nonfinite and self.max_error <= self.max_budget and self.mean_error <= self.mean_budget

    def __str__(self) -> str:
        verdict = "ok" if self.ok else "OUTSIDE ITS BUDGET"
        places = "" if self.same_nonfinite else "; NaN or infinity in different places than the reference"
        return (
            f"{self.name}: max error {self.max_error:.3g} (budget {self.max_budget:.3g}), mean error "
            f"{self.mean_error:.3g} (budget {self.mean_budget:.3g}){places}: {verdict}"
        )


def measure_error(
    name: str, actual: torch.Tensor, reference: torch.Tensor, eager: torch.Tensor, *, backward: bool = False
) -> ErrorReport:
    """Compare ``actual`` with the float64 ``reference``; ``eager`` is plain PyTorch's result in ``actual``'s dtype.

    Shapes must be equal. Where the reference is NaN or infinite, ``actual`` must be the same there.
    """
    if not actual.shape == reference.shape == eager.shape:
        raise ValueError(f"{name}: shapes differ: {actual.shape}, reference {reference.shape}, eager {eager.shape}")
    dtype, actual, eager = actual.dtype, actual.detach().double(), eager.detach().double()
    reference = reference.detach().double()
    finite = reference.isfinite()
    same = bool((actual.isfinite() == finite).all()) and torch.equal(
        actual[~finite].nan_to_num(nan=12345.0), reference[~finite].nan_to_num(nan=12345.0)
    )
    ref = reference[finite]
    if ref.numel() == 0:
        return ErrorReport(name, 0.0, 0.0, 0.0, 0.0, same)
    ours, theirs = (actual[finite] - ref).abs(), (eager[finite] - ref).abs().nan_to_num(nan=0.0, posinf=0.0)
    rounded = ref.to(dtype)
    floor = 2 * ((rounded + 0.3 - 0.3).double() - rounded.double()).abs().max().item()
    return ErrorReport(
        name,
        max_error=ours.max().item(),
        max_budget=(3 if backward else 2) * theirs.max().item() + floor,
        mean_error=ours.mean().item(),
        mean_budget=MEAN_FACTOR * theirs.mean().item() + torch.finfo(dtype).eps / 4 * ref.abs().mean().item(),
        same_nonfinite=same,
    )


def largest(*tensors: torch.Tensor) -> float:
    """The largest finite magnitude, 0 where there is none."""
    return max((t[t.isfinite()].abs().max().item() for t in tensors if t.isfinite().any()), default=0.0)


def of_few(name: str, reference: Mapping[str, torch.Tensor], dtype: torch.dtype) -> float:
    """In random problems: the least that is allowed where fewer than FEW numbers decide the largest error, else 0.

    Such a result is no yardstick: two equally good roundings of n numbers differ by luck, and the ratio of their
    largest errors passes 2 with a chance of 29 % at n = 1, 5 % at 8 and 0.5 % at 32. The largest error is among the
    large numbers: those of less than an eighth of the largest do not count. Instead UNITS of rounding of the largest
    are allowed. A gradient that only cancels (one key's softmax has none, nor has a bias of all keys) is in a kernel a
    sum of rounded terms of the size of the problem's other results, and exact in plain PyTorch: there the largest of
    all counts.

    Args:
        name: of the result.
        reference: every result of the problem in float64, by name.
        dtype: that the result was computed in.
    """
    whole, own = largest(*reference.values()), largest(reference[name])
    if own < 1e-9 * whole:
        return UNITS * torch.finfo(dtype).eps * max(1.0, whole)
    size = reference[name].abs()
    numbers = int((size.isfinite() & (size > own / 8)).sum())
    return UNITS * torch.finfo(dtype).eps * max(1.0, own) if numbers < FEW else 0.0


def assert_within_budget(
    name: str, actual: torch.Tensor, reference: torch.Tensor, eager: torch.Tensor, *, backward: bool = False
) -> None:
    """Raise AssertionError, with the figures, when ``actual`` is outside its budget."""
    report = measure_error(name, actual, reference, eager, backward=backward)
    if not report.ok:
        raise AssertionError(str(report))


def assert_together(problems: Iterable[Iterable[ErrorReport]]) -> None:
    """Every largest error inside its budget, and mean errors with their budgets added up over problems of one kind.

    The numbers of a row err together, so that of a handful of rows the ratio of two mean errors is luck.
    """
    mean: dict[str, float] = {}
    budget: dict[str, float] = {}
    for report in (report for reports in problems for report in reports):
        assert report.same_nonfinite and report.max_error <= report.max_budget, str(report)
        mean[report.name] = mean.get(report.name, 0.0) + report.mean_error
        budget[report.name] = budget.get(report.name, 0.0) + report.mean_budget
    outside = {name: (mean[name], budget[name]) for name in mean if mean[name] > budget[name]}
    assert not outside, f"mean errors and their budgets: {outside}"
