"""What a trial is, and how it is judged: against the reference in float64 on the same rounded inputs.

The yardstick is plain PyTorch in the trial's dtype for attention, as in the tests, and the reference in that dtype for
the others; see :func:`judge`.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from fastxattn.ops.attention import backends as attention_backends
from fastxattn.testing import attention as contract
from fastxattn.testing import measure_error
from fastxattn.testing.budget import largest, of_few

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LENGTHS = (0, 1, 2, 5, 16, 17, 31, 64, 65, 130, 257)
SLACK = 2.0
"""How many times its budget the error of an operation may be whose yardstick is its own reference."""
T = TypeVar("T")


class Draw:
    """Chance: the same seed draws the same problem. For Triton's interpreter problems are smaller."""

    def __init__(self, seed: int, dtype: torch.dtype, backend: str = "cpu") -> None:
        self.r, self.g = random.Random(seed), torch.Generator().manual_seed(seed)
        self.dtype, self.small = dtype, backend == "triton"

    def of(self, *values: T) -> T:
        """One of the values."""
        return self.r.choice(values)

    def often(self, share: float) -> bool:
        """True with this probability."""
        return self.r.random() < share

    def size(self, *values: int) -> int:
        """One of the values that are not too large here."""
        return self.r.choice([n for n in values if not self.small or n <= 70])

    def lengths(self, batch: int, longest: int = 257) -> list[int]:
        """Of every sequence; empty ones are common."""
        return [min(longest, self.size(*LENGTHS)) for _ in range(batch)]

    def rows(self, *shape: int, unit: bool = False) -> Tensor:
        """Normal numbers, rounded to the dtype; rows of length 1 if asked for."""
        x = torch.randn(*shape, generator=self.g)
        return (torch.nn.functional.normalize(x, dim=-1) if unit else x).to(self.dtype)

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        """int64 in [low, high)."""
        return torch.randint(low, high, shape, generator=self.g)

    def chance(self, n: int, share: float) -> Tensor:
        """(n,) bool, True with this probability."""
        return torch.rand(n, generator=self.g) < share


@dataclass(frozen=True)
class Trial:
    """One problem: inputs, and a function of them on a named backend."""

    case: str
    dtype: torch.dtype
    inputs: dict[str, Tensor]
    """Inputs, rounded to the dtype (scales and weights stay float32); the reference gets them in float64."""
    function: Callable[[dict[str, Tensor], str], Any]
    exact: bool = False
    """Results are indices or copies: they must be equal."""
    gradients: bool = True
    terms: float = 0.0
    """The largest of the float32 numbers that results are differences of: their rounding counts too."""


Maker = Callable[[Draw], Trial]


@dataclass(frozen=True)
class Judgement:
    """The worst result of a trial."""

    result: str
    error: float
    budget: float
    fault: str = ""

    @property
    def ok(self) -> bool:
        """Whether it is inside its budget."""
        return not self.fault and self.error <= self.budget


def results(trial: Trial, backend: str, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """Results and gradients of a trial; ``dtype`` converts its inputs first."""
    wanted = trial.gradients and not trial.exact
    leaves = {n: t.detach().to(dtype or t.dtype).requires_grad_(wanted) for n, t in trial.inputs.items()}
    out = trial.function(leaves, backend)
    out = out if isinstance(out, tuple) else (out,)
    found = {f"out {i}": t.detach() for i, t in enumerate(out)}
    if any(t.requires_grad for t in out):
        g = torch.Generator().manual_seed(1)
        weights = [torch.randn(t.shape, generator=g, dtype=torch.float64).to(t.dtype) for t in out]
        # Rows that see nothing have an lse of -inf: no weight there.
        total = sum((t.masked_fill(t == -torch.inf, 0) * w).sum().double() for t, w in zip(out, weights, strict=True))
        grads = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)  # type: ignore[arg-type]
        found |= {
            f"grad {n}": torch.zeros_like(leaves[n]) if d is None else d for n, d in zip(leaves, grads, strict=True)
        }
    return found


def computed_in(name: str, value: Tensor, dtype: torch.dtype) -> torch.dtype:
    """The dtype whose rounding a result shows: its own, and of gradients the problem's.

    Nothing is computed in float64: attention hands its lse on in it, so as not to round it once more.
    """
    own = dtype if name.startswith("grad") else value.dtype
    return torch.float32 if own == torch.float64 else own


def judge(trial: Trial, backend: str) -> Judgement:
    """The result with the largest error beside its budget."""
    ours = results(trial, backend, None)
    if trial.exact:
        wanted = results(trial, "reference", None)
        wrong = [n for n in ours if not torch.equal(ours[n].nan_to_num(nan=-9.0), wanted[n].nan_to_num(nan=-9.0))]
        return Judgement("all", 0.0, 0.0, f"{', '.join(wrong)} differ" if wrong else "")
    truth, yard = results(trial, "reference", torch.float64), results(trial, "reference", None)
    worst = Judgement("none", 0.0, 1.0)
    for name, value in ours.items():
        report = measure_error(name, value, truth[name], yard[name], backward=name.startswith("grad"))
        if not report.same_nonfinite:
            return Judgement(name, report.max_error, report.max_budget, "NaN or infinity in other places")
        dtype = computed_in(name, value, trial.dtype)
        rounding = torch.finfo(dtype).eps * largest(truth[name])
        rounding = max(rounding, torch.finfo(torch.float32).eps * trial.terms)
        budget = SLACK * max(report.max_budget + rounding, of_few(name, truth, dtype))
        found = Judgement(name, report.max_error, budget)
        if found.error * worst.budget > worst.error * found.budget:
            worst = found
    return worst


def attention_problem(draw: Draw) -> tuple[str, contract.Problem]:
    """A random case of the attention contract."""
    r = draw.r
    batch, kv_heads = r.randint(1, 4), r.choice((1, 2, 3))
    of_q, of_k = draw.lengths(batch), draw.lengths(batch)
    if not any(q and k for q, k in zip(of_q, of_k, strict=True)):
        of_q[0] = of_k[0] = 1  # the eager yardstick has no gradient where nothing sees anything; tests cover that
    padded = r.random() < 0.3
    case = contract.AttentionCase(
        "random",
        tuple(of_q),
        tuple(of_k),
        kv_heads * r.choice((1, 1, 2)),
        kv_heads,
        r.choice((1, 8, 33, 64, 80, 128)),
        r.choice((1, 16, 64, 72)),
        r.choice((0.0, 0.0, 3.0)),
        r.choice((0.0, 0.0, 0.3)),
        r.choice(("", "", "random", "causal")),
        r.choice(("", "", "row", "head")),
        None,
        not padded and r.random() < 0.3,
        padded,
    )
    return repr(case), case.problem(draw.dtype, seed=r.randrange(1 << 30))


def attention_results(problem: contract.Problem, backend: str) -> dict[str, Tensor]:
    """Results and gradients of attention."""
    return contract.results(functools.partial(attention_backends.run_on, backend), problem)


def judge_attention(draw: Draw, backend: str) -> tuple[str, Judgement]:
    """A random attention problem, under the tests' own yardstick: plain PyTorch in the same dtype."""
    case, problem = attention_problem(draw)
    ours = attention_results(problem, backend)
    truth, eager = contract.expectations(problem)
    worst = Judgement("none", 0.0, 1.0)
    for name, value in ours.items():
        report = measure_error(name, value, truth[name], eager[name], backward=name.startswith("grad"))
        if not report.same_nonfinite:
            return case, Judgement(name, report.max_error, report.max_budget, "NaN or infinity in other places")
        few = of_few(name, truth, computed_in(name, value, draw.dtype))
        found = Judgement(name, report.max_error, max(report.max_budget, few))
        if found.error * worst.budget > worst.error * found.budget:
            worst = found
    return case, worst
