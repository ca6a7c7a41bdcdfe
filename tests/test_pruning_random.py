"""Random pruning problems against the reference, the definition, and each sequence by itself; see benchmarks/soak."""

from __future__ import annotations

import collections

import pytest
import torch

from benchmarks.soak import pruning
from benchmarks.soak.pruning import FUNCTIONS, Problem, check, draw
from benchmarks.soak.trials import DTYPES, Draw
from fastxattn.ops.pruning import Budget, segments, select_tokens
from fastxattn.runtime import native

BACKEND = "cpu" if native.available_cpu_isas() else "reference"
PROBLEMS = 1050
refusal = pruning.refusal


def problem(seed: int) -> Problem:
    return draw(Draw(seed, DTYPES[seed % 3]))


@pytest.mark.parametrize("part", range(7))
def test_random_problems(part: int) -> None:
    for seed in range(part * PROBLEMS // 7, (part + 1) * PROBLEMS // 7):
        check(problem(seed), BACKEND)


def test_a_sequence_does_not_notice_its_neighbours_in_the_reference() -> None:
    for seed in range(150):
        check(problem(seed), "reference")


def test_every_strategy_meets_every_budget() -> None:
    drawn: dict[str, set[str]] = collections.defaultdict(set)
    for seed in range(PROBLEMS):
        budget = (p := problem(seed)).budget
        drawn[p.strategy].add(f"{budget.kind} {budget.by}" if isinstance(budget, Budget) else "tensor")
    assert set(drawn) == set(FUNCTIONS)
    assert all(len(kinds) >= 6 for kinds in drawn.values()), drawn
    assert len(set.union(*drawn.values())) == 8


def check_all() -> None:
    for seed in range(PROBLEMS):
        check(problem(seed), BACKEND)


def faults() -> str:
    """What the check says of the problems up to the first fault."""
    with pytest.raises(AssertionError) as caught:
        check_all()
    return str(caught.value)


def test_the_check_notices_running_sums_that_span_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    def mass(self: Budget, scores: torch.Tensor, cu: torch.Tensor, protected: torch.Tensor | None) -> torch.Tensor:
        ranked = segments.best_first(scores, cu, protected)
        ordered = scores.double().nan_to_num(nan=0.0).clamp_min(0.0)[ranked]
        running = torch.nn.functional.pad(ordered.cumsum(0), (1, 0))
        start = running[cu[:-1].long()]
        wanted = self.value * (running[cu[1:].long()] - start)
        row = segments.sequence_ids(cu, scores.shape[0])
        needed = running[:-1] - start[row] < wanted[row] * (1 - 1e-12)
        return segments.segment_count(needed if protected is None else needed | protected[ranked], cu)

    monkeypatch.setattr(Budget, "_mass", mass)
    assert "keeps" in faults()


def test_the_check_notices_numbers_drawn_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    def in_turn(tokens, cu_seqlens, budget, *, seed=0, **options):  # type: ignore[no-untyped-def]
        scores = torch.rand(tokens.shape[0], generator=torch.Generator().manual_seed(seed % 2**63))
        return select_tokens(scores, cu_seqlens, budget, **options)

    monkeypatch.setitem(FUNCTIONS, "random", in_turn)
    monkeypatch.setattr(pruning, "refusal", lambda p: None if p.strategy == "random" else refusal(p))
    assert "alone differ" in faults()


def test_the_check_notices_wrong_picks(monkeypatch: pytest.MonkeyPatch) -> None:
    right = FUNCTIONS["divprune"]

    def wrong(tokens, cu_seqlens, budget, **options):  # type: ignore[no-untyped-def]
        if options["backend"] == "reference":
            return right(tokens, cu_seqlens, budget, **options)
        return right(tokens.flip(1) * torch.linspace(0.5, 1.5, tokens.shape[1]), cu_seqlens, budget, **options)

    monkeypatch.setitem(FUNCTIONS, "divprune", wrong)
    assert "is not the reference's" in faults()
