"""Random pruning problems: every strategy with every budget, on sequences of 0 to 40 tokens with hostile neighbours.

:func:`check` compares a backend with the reference, each sequence by itself with the same sequence in its batch, and
counts with the budget's definition in exact arithmetic. The tests and the soak draw from the same generator.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from benchmarks.soak.pruning_ties import near_tie
from benchmarks.soak.trials import Draw, Maker, Trial
from fastxattn.ops.pruning import STRATEGIES, Budget, Selection, select_tokens
from fastxattn.testing import offsets

LENGTHS = (0, 0, 1, 2, 3, 5, 8, 16, 17, 25, 40)
CONTENTS = ("normal", "normal", "normal", "ties", "duplicates", "nan", "infinite", "zero")
EXTREME = ("huge", "tiny")
"""Rows whose squares are out of float32's range: GPU kernels take them for rows that are not finite, or zero."""
WITHOUT_SCORES = ("tome", "divprune", "cdpruner", "random", "uniform", "pool")
MANY = 50
"""Problems of one trial: they are small, and with so many a soak of 20 minutes tries more than 10 000."""


def by_scores(tokens: Tensor, cu_seqlens: Tensor, budget: Budget | Tensor, *, attention: Tensor, **options: Any) -> Any:
    """Plain ``select`` as a strategy."""
    return select_tokens(attention, cu_seqlens, budget, **options)


FUNCTIONS = {**STRATEGIES, "select": by_scores}


@dataclass(frozen=True)
class Problem:
    """Arguments of one call of a strategy."""

    strategy: str
    budget: Budget | Tensor
    lengths: tuple[int, ...]
    tokens: Tensor
    vectors: dict[str, Tensor]
    """Options with a value per token: attention, relevance, protected, sizes."""
    options: dict[str, Any]

    def __str__(self) -> str:
        return f"{self.strategy}, {self.budget}, {list(self.lengths)}, {[*self.vectors]}, {self.options}"

    def run(self, backend: str) -> Selection:
        """The strategy's selection."""
        options = {**self.vectors, **self.options, "backend": backend}
        selection = FUNCTIONS[self.strategy](self.tokens, offsets(self.lengths), self.budget, **options)
        assert isinstance(selection, Selection)
        return selection

    def alone(self, b: int) -> Problem:
        """Sequence ``b`` by itself; for ``random``, whose draw depends on b, among empty neighbours."""
        begin = sum(self.lengths[:b])
        rows = slice(begin, begin + self.lengths[b])
        budget, options = self.budget, dict(self.options)
        lengths: tuple[int, ...] = (self.lengths[b],)
        if self.strategy == "random":
            lengths = tuple(n if i == b else 0 for i, n in enumerate(self.lengths))
        elif isinstance(budget, Tensor):
            budget = budget[b : b + 1]
        if isinstance(options.get("columns"), Tensor):
            options["columns"] = options["columns"][b : b + 1]
        vectors = {name: vector[rows] for name, vector in self.vectors.items()}
        return replace(self, tokens=self.tokens[rows], budget=budget, lengths=lengths, vectors=vectors, options=options)


def fill(d: Draw, kind: str, n: int, width: int) -> tuple[Tensor, Tensor]:
    """Rows and scores of one sequence, float32."""
    x, scores = torch.randn(n, width, generator=d.g), torch.rand(n, generator=d.g)
    some = d.chance(n, 0.3)
    if kind == "ties":
        scores = d.integers(-1, 3, n).float()
    elif kind == "duplicates" and n:
        source = d.integers(0, max(1, n // 3), n)
        x, scores = x[source], scores[source]
    elif kind == "nan":
        x[some], scores[d.chance(n, 0.3)] = torch.nan, torch.nan
    elif kind == "infinite":
        x[some, 0] = d.of(torch.inf, -torch.inf)
        scores[d.chance(n, 0.3)] = torch.inf
        scores[d.chance(n, 0.1)] = -torch.inf
    elif kind == "huge":
        x[some] *= 1e30
        scores = scores * 3e38
    elif kind == "zero":
        x[some], scores = 0, torch.zeros(n)
    elif kind == "tiny":
        x[some] *= 1e-30
        scores = scores * 1e-38
    return x, scores


def any_budget(d: Draw, lengths: list[int]) -> Budget | Tensor:
    """Each kind as often, values at the ends of their ranges among them."""
    limits: dict[str, Any] = {}
    if d.often(0.4):
        limits["minimum"] = d.of(0, 1, 3, 50)
    few: dict[str, Any] = dict(limits)
    if d.often(0.3):
        few["maximum"] = limits.get("minimum", 1) + d.of(0, 2, 9)
    kind = d.of("count", "ratio", "total", "by score", "threshold", "mass", "adaptive", "tensor")
    if kind == "count":
        return Budget.count(d.of(0, 1, 2, 5, 12, 40, 2**40))
    if kind == "ratio":
        return Budget.ratio(d.of(0.0, 0.1, 0.25, 1 / 3, 0.5, 0.9, 1.0), **limits)
    if kind == "total":
        return Budget.total(d.of(0, 1, 7, 30, 1000))
    if kind == "by score":
        return Budget.total(d.of(0, 1, 7, 30, 1000), by="score")
    if kind == "threshold":
        return Budget.threshold(d.of(-math.inf, -1.0, 0.0, 0.3, 0.8, 1e30, math.inf), **few)
    if kind == "mass":
        return Budget.mass(d.of(0.0, 0.1, 0.5, 0.9, 0.999, 1.0), **few)
    if kind == "adaptive":
        return Budget.adaptive(d.of(0.0, 0.5, 1.5, 1e300), **few)
    expected = [d.r.randint(-1, n + 2) for n in lengths]
    spaced = torch.tensor([n for pair in zip(expected, expected, strict=True) for n in pair], dtype=torch.int32)
    return spaced[::2]  # not contiguous


def draw(d: Draw) -> Problem:
    """A problem."""
    lengths = [d.size(*LENGTHS) for _ in range(d.r.randint(0, 5))]
    width, strategy = d.of(3, 8, 17), d.of(*FUNCTIONS)
    contents = CONTENTS if d.small else (*CONTENTS, *EXTREME)
    parts = [fill(d, d.of(*contents), n, width) for n in lengths]
    tokens = torch.cat([torch.zeros(0, width), *(x for x, _ in parts)]).to(d.dtype)
    scores = torch.cat([torch.zeros(0), *(s for _, s in parts)])
    vectors: dict[str, Tensor] = {}
    options: dict[str, Any] = {}
    needs = STRATEGIES[strategy].needs if strategy in STRATEGIES else ("attention",)
    if "attention" in needs:
        vectors["attention"] = scores
    if strategy == "cdpruner" and d.often(0.7):
        vectors["relevance"] = scores
    if "sizes" in needs and d.often(0.5):
        vectors["sizes"] = d.integers(1, 5, len(scores)).float()
    if "columns" in needs and d.often(0.5):
        options["columns"] = d.of(1, 4, d.integers(1, 7, len(lengths)))
    if strategy == "random":
        options["seed"] = d.of(0, 1, -7, 2**63, d.r.randrange(1 << 40))
    if strategy == "visionzip" and d.often(0.3):
        options["contextual"] = d.of(0, 1)
    if d.often(0.5):
        vectors["protected"] = d.chance(len(scores), d.of(0.02, 0.2, 0.7))
    return Problem(strategy, any_budget(d, lengths), tuple(lengths), tokens, vectors, options)


def refusal(problem: Problem) -> str | None:
    """What the message of the refusal of this budget must say; None: the strategy takes it."""
    budget, name = problem.budget, problem.strategy
    if name == "visionzip":
        if not isinstance(budget, Budget) or budget.kind != "count":
            return "budget must be a count for visionzip"
        few = problem.options.get("contextual", 0)
        return "contextual must lie between 0 and the budget" if few > budget.value else None
    if isinstance(budget, Budget) and not budget.by_length and name in WITHOUT_SCORES:
        return f"for {name}, which has no scores before it picks"
    return None


def expected_counts(budget: Budget, scores: list[float], protected: list[bool], lengths: tuple[int, ...]) -> list[Any]:
    """Counts by the budget's definition, a set of them where float32 rounding decides."""
    ends = list(itertools.accumulate(lengths, initial=0))
    expected: list[set[int]] = []
    best = sorted(range(len(scores)), key=lambda i: (not protected[i], scores[i] != scores[i], -scores[i], i))
    for begin, end in itertools.pairwise(ends):
        n, rows = end - begin, range(begin, end)
        free = [scores[i] for i in rows if not protected[i]]
        guarded = n - len(free)
        if budget.kind == "count":
            counts = {int(budget.value)}
        elif budget.kind == "ratio":
            counts = {math.ceil(Fraction(budget.value) * n - Fraction(1, 10**9))}
        elif budget.kind == "total" and budget.by == "score":
            counts = {sum(i in rows for i in best[: int(budget.value)])}
        elif budget.kind == "total":
            exact = Fraction(min(int(budget.value), ends[-1]) * n, max(1, ends[-1]))
            counts = {math.floor(exact), math.ceil(exact)}
        elif budget.kind == "threshold":
            counts = {guarded + sum(s >= torch.tensor(budget.value).item() for s in free)}
        elif budget.kind == "mass":
            counts = {guarded + k for k in _mass(budget.value, free)}
        else:
            counts = {guarded + k for k in _outliers(budget.value, [scores[i] for i in rows], free)}
        most = n if budget.maximum is None else min(n, budget.maximum)
        expected.append({min(max(k, budget.minimum), most) for k in counts})
    return expected


def _mass(share: float, scores: list[float]) -> set[int]:
    ranked = sorted((s for s in scores if s > 0), reverse=True)
    if ranked and ranked[0] == math.inf:
        ranked = [1.0 for s in ranked if s == math.inf]
    exact = [Fraction(s) for s in ranked]
    expected, before, counts = Fraction(share) * sum(exact), Fraction(0), set()
    tolerance = sum(exact) / 10**9
    for slack in (-tolerance, Fraction(0), tolerance):
        counts.add(sum(b < expected + slack for b in itertools.accumulate(exact[:-1], initial=before)) if exact else 0)
    return set(range(min(counts), max(counts) + 1))


def _outliers(factor: float, scores: list[float], free: list[float]) -> set[int]:
    numbers = sorted(s for s in scores if s == s)
    if not numbers or numbers[0] == -math.inf or numbers[-1] == math.inf or factor > 1e6:
        return set(range(len(free) + 1))
    first, third = (
        float(torch.tensor(numbers, dtype=torch.float64).quantile(q, interpolation="linear")) for q in (0.25, 0.75)
    )
    cut, slack = third + factor * (third - first), 1e-5 * max(map(abs, numbers))
    counts = [sum(s > cut + move for s in free) for move in (-slack, slack)]
    return set(range(min(counts), max(counts) + 1))


def check(problem: Problem, backend: str) -> None:
    """Raise an AssertionError unless ``backend`` gives what the definition, the reference and lone sequences give."""
    if (words := refusal(problem)) is not None:
        said = ""
        try:
            problem.run(backend)
        except ValueError as error:
            said = str(error)
        assert words in said, f"{problem}: not refused, or by other words: {said}"
        return
    found, expected = problem.run(backend), problem.run("reference")
    for name in ("keep_index", "cu_seqlens", "assignment"):
        same = torch.equal(getattr(found, name), getattr(expected, name))
        assert same or near_tie(problem, found, expected), f"{problem}: {name} is not the reference's"
    _check_counts(problem, found)
    rows = found.reduce(problem.tokens)
    _check_rows(problem, rows, found)
    if isinstance(problem.budget, Budget) and problem.budget.kind == "total":
        if problem.strategy == "visionzip":
            return
        protected = problem.vectors.get("protected")
        counts = problem.budget.counts(found.scores, offsets(problem.lengths), protected)
        problem = replace(problem, budget=counts)  # sharing is its purpose
    starts = [int(n) for n in found.cu_seqlens]
    for b, begin in enumerate(itertools.accumulate(problem.lengths[:-1], initial=0) if problem.lengths else ()):
        lone = problem.alone(b)
        other = lone.run(backend)
        mine = slice(starts[b], starts[b + 1])
        assert torch.equal(other.keep_index + begin, found.keep_index[mine]), f"{problem}: sequence {b} alone differs"
        same = torch.equal(other.reduce(lone.tokens).nan_to_num(nan=-9.0), rows[mine].nan_to_num(nan=-9.0))
        assert same, f"{problem}: rows of sequence {b} alone differ"


def _check_counts(problem: Problem, found: Selection) -> None:
    if not isinstance(problem.budget, Budget):
        return
    scores = found.scores.tolist()  # random ones and norms are the strategy's own
    protected = problem.vectors.get("protected", torch.zeros(sum(problem.lengths), dtype=torch.bool)).tolist()
    expected = expected_counts(problem.budget, scores, protected, problem.lengths)
    counts = found.cu_seqlens.diff().tolist()
    for b, (count, right) in enumerate(zip(counts, expected, strict=True)):
        n = problem.lengths[b]
        if problem.strategy == "evit":  # one more for the leftover
            right = {min(k + 1, n) for k in right}
        elif problem.strategy == "tome":  # at most half of the others merge
            begin = sum(problem.lengths[:b])
            free = n - sum(protected[begin : begin + n])
            right = {max(k, n - free // 2 - (free % 2 if free > 1 else 0)) for k in right}
        elif problem.strategy == "visionzip":  # rows that are not finite become no contextual tokens
            right = set(range(min(right) + 1)) if not problem.tokens.isfinite().all() else right
        assert count in right, f"{problem}: sequence {b} keeps {count}, not {right}"
    if (
        isinstance(problem.budget, Budget)
        and problem.budget.kind == "total"
        and problem.strategy not in ("evit", "tome")
    ):
        assert sum(counts) == min(int(problem.budget.value), sum(problem.lengths)), f"{problem}: {counts}"


def _check_rows(problem: Problem, rows: Tensor, expected: Selection) -> None:
    """Merged rows within rounding of the reference's sum in float64; copies exactly."""
    if expected.weight is None:
        assert torch.equal(rows.nan_to_num(nan=-9.0), expected.gather(problem.tokens).nan_to_num(nan=-9.0)), str(
            problem
        )
        return
    coefficient = expected.coefficient
    assert coefficient is not None
    x, factor = problem.tokens.double(), coefficient.double()[:, None]
    at = torch.where(expected.assignment >= 0, expected.assignment, expected.rows).long()
    joins = (expected.assignment >= 0)[:, None]
    zeros = torch.zeros(expected.rows + 1, x.shape[1], dtype=torch.float64)
    exact = zeros.index_add(0, at, torch.where(joins, x * factor, 0.0))[:-1]
    size = zeros.index_add(0, at, torch.where(joins, (x * factor).abs(), 0.0))[:-1]
    eps = torch.finfo(problem.tokens.dtype).eps
    error = (rows.double() - exact).abs()
    finite = exact.isfinite() & (size < torch.finfo(problem.tokens.dtype).max)
    bound = eps * size + 16 * torch.finfo(torch.float32).eps * size + torch.finfo(problem.tokens.dtype).smallest_normal
    assert bool((error <= bound)[finite].all()), f"{problem}: rows off by {float((error / bound)[finite].max()):.2g}"
    assert torch.equal(rows.isnan()[~size.isinf()], exact.isnan()[~size.isinf()]), f"{problem}: NaN in other places"


def problems(d: Draw) -> Trial:
    """Many problems in one trial; one for Triton's interpreter."""
    drawn = [draw(d) for _ in range(1 if d.small else MANY)]

    def run(_: dict[str, Tensor], backend: str) -> Tensor:
        if backend != "reference":
            for problem in drawn:
                check(problem, backend)
        return torch.ones(1)

    return Trial(f"{len(drawn)} problems", d.dtype, {}, run, exact=True)


PRUNING: dict[str, Maker] = {"strategies": problems}
