"""A row's problem, ready to be called in any way, and what its results are held to."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fastxattn.runtime.backend import use_backend
from fastxattn.testing import measure_error
from fastxattn.testing.budget import UNITS, largest
from tests.compositions.row import Inputs, Row

Results = dict[str, Tensor]


class Wrong(AssertionError):
    """A result that is not right, with no word about it from the library."""


class Problem:
    """Inputs and a function of them; a module's parameters belong to the function."""

    def __init__(self, row: Row, dtype: torch.dtype = torch.float32) -> None:
        self.row, self.dtype = row, dtype
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.module: nn.Module | None = None if row.build is None else row.build().eval().to(dtype)
        self.inputs = self.make(0)
        floating = [name for name, t in self.inputs.items() if t.is_floating_point()]
        self.names = [name for name in floating if name not in row.constant] if row.derivative else []

    def make(self, size: int) -> Inputs:
        """Inputs of a size, in this problem's dtype; the same each time."""
        made = self.row.made(size).items()
        return {name: t.to(self.dtype) if t.is_floating_point() else t for name, t in made}

    def copied(self) -> Inputs:
        """The inputs, cloned."""
        return {name: t.clone() for name, t in self.inputs.items()}

    def leaves(self, *names: str, inputs: Inputs | None = None) -> Inputs:
        """Inputs of which these (by default all that are differentiable) want a gradient."""
        wanted = names or tuple(self.names)
        given = self.copied() if inputs is None else inputs
        return {n: t.detach().requires_grad_(n in wanted) if t.is_floating_point() else t for n, t in given.items()}

    def __call__(self, inputs: Inputs) -> tuple[Tensor, ...]:
        """All tensors of the result."""
        out = self.row.call(self.module, inputs)
        return tuple(pytree.tree_leaves(out))

    def trimmed(self, out: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Results without the rows that only a traced call gives."""
        if self.row.ragged is None:
            return out
        rows, cu = self.row.ragged
        return tuple(t[: int(out[cu][-1])] if i == rows else t for i, t in enumerate(out))

    def parameters(self) -> dict[str, Tensor]:
        """Of the module, by name."""
        return {} if self.module is None else {f"parameter {n}": p for n, p in self.module.named_parameters()}

    def scalar(self, inputs: Inputs) -> Tensor:
        """A number that depends on every floating point result, and not linearly."""
        return weigh(self(inputs))

    def of(self, *names: str) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
        """:meth:`scalar` as a function of these inputs alone, and their values."""
        held = self.copied()
        return lambda *ts: self.scalar({**held, **dict(zip(names, ts, strict=True))}), tuple(held[n] for n in names)


def weigh(out: tuple[Tensor, ...]) -> Tensor:
    """The results' sines, weighed by fixed numbers and added up."""
    total = torch.zeros((), dtype=torch.float64)
    for t in out:
        if t.is_floating_point():
            weight = torch.linspace(0.5, 1.5, max(t.numel(), 1), dtype=torch.float64)[: t.numel()].reshape(t.shape)
            total = total + (t.double().sin() * weight).sum()
    return total


def outputs(problem: Problem, inputs: Inputs) -> Results:
    """What the call gives, detached."""
    return {f"out {i}": t.detach() for i, t in enumerate(problem.trimmed(problem(inputs)))}


def results(problem: Problem, inputs: Inputs | None = None, call: Callable[[Inputs], Any] | None = None) -> Results:
    """Outputs, and the gradients of :meth:`Problem.scalar` for inputs and parameters."""
    given = problem.leaves() if inputs is None else inputs
    parameters = problem.parameters()
    for p in parameters.values():
        p.grad = None
    out = pytree.tree_leaves((call or problem)(given))
    out = list(problem.trimmed(tuple(out)))
    found = {f"out {i}": t.detach() for i, t in enumerate(out)}
    total = weigh(tuple(out))
    if not total.requires_grad:
        return found
    total.backward()
    for name, t in {**given, **parameters}.items():
        if t.requires_grad and t.grad is not None:
            found[f"grad {name}"] = t.grad.detach().clone()
    return found


def reference(row: Row, dtype: torch.dtype) -> Results:
    """The same on the reference backend."""
    with use_backend("reference"):
        return results(Problem(row, dtype))


def same(actual: Results | Tensor, expected: Results | Tensor, what: str = "") -> None:
    """Equal up to the order of additions, or :class:`Wrong`."""
    if isinstance(expected, dict):
        assert isinstance(actual, dict)
        if actual.keys() != expected.keys():
            raise Wrong(f"{what}: results {sorted(actual)} and {sorted(expected)}")
        for name, t in expected.items():
            same(actual[name], t, f"{what} {name}")
        return
    assert isinstance(actual, Tensor)
    try:
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=2e-6, equal_nan=True, check_stride=False)
    except AssertionError as error:
        raise Wrong(f"{what}: {error}") from None


def near(actual: Results, exact: Results, yardstick: Results, dtype: torch.dtype) -> None:
    """Within the error budget: ``exact`` in float64, ``yardstick`` plain PyTorch's result in the same precision.

    These problems are tiny: where few numbers decide, some units of rounding are allowed, as in
    :func:`fastxattn.testing.budget.of_few`.
    """
    if actual.keys() != exact.keys():
        raise Wrong(f"results {sorted(actual)} and {sorted(exact)}")
    few = UNITS * torch.finfo(dtype).eps * max(1.0, largest(*(t for t in exact.values() if t.is_floating_point())))
    for name, t in actual.items():
        if not t.is_floating_point():
            if not torch.equal(t, exact[name]):
                raise Wrong(f"{name}: {t} instead of {exact[name]}")
            continue
        report = measure_error(name, t, exact[name], yardstick[name], backward=name.startswith("grad"))
        if not report.same_nonfinite or report.max_error > report.max_budget + few:
            raise Wrong(str(report))


def duplicate(problem: Problem) -> Problem:
    """A deep copy of the problem, its module included."""
    return copy.deepcopy(problem)
