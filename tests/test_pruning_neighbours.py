"""What one sequence gets does not depend on the others; what cannot be right is refused by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from fastxattn.nn import TokenPruner
from fastxattn.ops.pruning import (
    STRATEGIES,
    Budget,
    Selection,
    best_match,
    bipartite,
    frame_change,
    frame_counts,
    nearest,
    probe_scores,
    received_scores,
    select_tokens,
    text_relevance,
)
from fastxattn.ops.pruning.segments import share
from fastxattn.ops.pruning.selection import check_selection
from fastxattn.testing import offsets

INF, NAN = float("inf"), float("nan")
HOSTILE = {
    "infinite": torch.tensor([INF, 1.0, INF]),
    "minus infinite": torch.tensor([-INF, -INF, 2.0]),
    "NaN": torch.full((3,), NAN),
    "huge": torch.tensor([3e38, 3e38, 3e38]),
    "zero": torch.zeros(3),
    "one": torch.tensor([1e30]),
    "empty": torch.zeros(0),
}
BUDGETS = [
    Budget.count(4),
    Budget.ratio(0.3),
    Budget.threshold(0.4),
    Budget.mass(0.5),
    Budget.mass(0.9),
    Budget.adaptive(0.2),
]


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("budget", BUDGETS, ids=lambda b: f"{b.kind} {b.value}")
def test_counts_are_those_of_the_sequence_alone(budget: Budget, name: str) -> None:
    torch.manual_seed(0)
    mine, other = torch.rand(12), HOSTILE[name]
    alone = budget.counts(mine, offsets([12])).tolist()
    n = len(other)
    counts = budget.counts(torch.cat([other, mine, other, mine]), offsets([n, 12, n, 12])).tolist()
    assert [counts[1], counts[3]] == alone * 2
    assert 0 < alone[0] < 12


def test_mass_of_extreme_scores() -> None:
    scores = torch.tensor([INF, 1.0, INF, 5.0, 3e38, 3e38, 1e-40, 1e-40, NAN, -INF])
    counts = Budget.mass(0.6).counts(scores, offsets([4, 2, 2, 2]))
    assert counts.tolist() == [2, 2, 2, 0]
    assert Budget.mass(1.0).counts(scores, offsets([4, 2, 2, 2])).tolist() == [2, 2, 2, 0]


def test_a_minimum_is_kept_in_every_sequence() -> None:
    """The bound on all rows counts both what a ratio gives and what the minimum adds."""
    lengths = [100] + [3] * 20
    kept = select_tokens(torch.rand(160), offsets(lengths), Budget.ratio(0.5, minimum=3))
    assert kept.cu_seqlens.diff().tolist() == [50] + [3] * 20


def test_shares_reach_every_limit() -> None:
    torch.manual_seed(0)
    for n in (1, 3, 40, 200):
        weights = torch.rand(n, dtype=torch.float64) ** 40
        limits = torch.randint(0, 30, (n,))
        for total in (0, 1, int(limits.sum()) // 2, int(limits.sum()) - 1, int(limits.sum()), 10**9):
            got = share(total, weights, limits)
            assert int(got.sum()) == min(total, int(limits.sum()))
            assert bool(((got >= 0) & (got <= limits)).all())
    assert share(6, torch.tensor([INF, 1.0, NAN, 1.0]), torch.tensor([4, 4, 4, 4])).tolist() == [4, 1, 0, 1]
    assert share(4, torch.tensor([3e38, 3e38, 1.0], dtype=torch.float64) * 1e270, torch.full((3,), 9)).tolist() == [
        2,
        2,
        0,
    ]


@pytest.mark.parametrize("other", [torch.full((5, 3), NAN), torch.full((1, 3), 1e30), torch.zeros(0, 3)])
def test_scores_are_those_of_the_sequence_alone(other: torch.Tensor) -> None:
    torch.manual_seed(0)
    mine, text, n = torch.randn(7, 3), torch.randn(4, 3), len(other)
    cu, lone = offsets([n, 7, n]), offsets([7])
    batch = torch.cat([other, mine, other])
    here = slice(n, n + 7)
    query = torch.randn(3, 1, 3)
    for scores, alone in (
        (probe_scores(query, batch[:, None], cu), probe_scores(query[1:2], mine[:, None], lone)),
        (received_scores(batch[:, None], batch[:, None], cu), received_scores(mine[:, None], mine[:, None], lone)),
        (
            text_relevance(batch, torch.cat([other, text]), cu, offsets([n, 4, 0])),
            text_relevance(mine, text, lone, offsets([4])),
        ),
    ):
        torch.testing.assert_close(scores[here], alone, rtol=1e-6, atol=1e-7)


def test_rows_beyond_the_last_sequence_reach_no_gradient() -> None:
    query = torch.randn(1, 2, 4, requires_grad=True)
    key = torch.cat([torch.randn(5, 2, 4), torch.full((2, 2, 4), NAN)]).requires_grad_()
    probe_scores(query, key, offsets([5]))[:5].square().sum().backward()
    assert query.grad is not None
    assert query.grad.isfinite().all()
    assert (
        frame_counts(key[:, 0].detach(), offsets([2, 3]), 4).tolist()
        == frame_counts(key[:5, 0].detach(), offsets([2, 3]), 4).tolist()
    )


def test_random_draws_depend_on_seed_and_place_in_the_batch_alone() -> None:
    def kept(lengths: list[int], seed: int) -> list[list[int]]:
        selection = STRATEGIES["random"](torch.zeros(sum(lengths), 2), offsets(lengths), Budget.count(6), seed=seed)
        parts = selection.keep_index.split(selection.cu_seqlens.diff().tolist())
        return [(part - start).tolist() for part, start in zip(parts, offsets(lengths).tolist(), strict=False)]

    first = kept([20, 30, 40], 3)
    assert kept([20, 30, 40], 3) == first
    assert kept([20, 30, 7, 9], 3)[:2] == first[:2]
    assert kept([0, 30, 40], 3)[1:] == first[1:]
    assert kept([20, 30, 40], 4) != first
    same = kept([40] * 200, 0)
    assert len({tuple(part) for part in same}) == 200, "every sequence has a draw of its own"
    counts = torch.bincount(torch.tensor(same).flatten(), minlength=40)
    assert counts.float().std() < 2.5 * (200 * 6 / 40) ** 0.5, "no place is drawn more often than others"


# CDPruner's relevance -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [0.0, 1.0, -2.0, 1e-30, 1e30, NAN, INF])
def test_relevance_that_says_nothing_leaves_diversity(value: float, backend: str) -> None:
    torch.manual_seed(0)
    x, cu = torch.randn(32, 8), offsets([16, 16])
    want = STRATEGIES["cdpruner"](x, cu, Budget.count(4), backend=backend)
    half = torch.rand(16) + 0.5
    relevance = torch.cat([torch.full((16,), value), half])
    got = STRATEGIES["cdpruner"](x, cu, Budget.count(4), relevance=relevance, backend=backend)
    assert got.keep_index[:4].tolist() == want.keep_index[:4].tolist() != [0, 1, 2, 3]
    alone = STRATEGIES["cdpruner"](x[16:], offsets([16]), Budget.count(4), relevance=half, backend=backend)
    assert (got.keep_index[4:] - 16).tolist() == alone.keep_index.tolist()


def test_a_text_without_tokens_is_no_relevance() -> None:
    torch.manual_seed(0)
    image, text = torch.randn(24, 8), torch.randn(3, 8)
    image[3], text[2] = NAN, NAN
    relevance = text_relevance(image, text, offsets([12, 12]), offsets([3, 0]))
    assert relevance[12:].tolist() == [1.0] * 12
    assert relevance[3].isnan()
    rest = relevance[:12][torch.arange(12) != 3]
    assert float(rest.min()) == 0
    assert float(rest.max()) == 1
    clean = text_relevance(image[[0, 1, 2, *range(4, 12)]], text[:2], offsets([11]), offsets([2]))
    torch.testing.assert_close(rest, clean)


# Differences from the papers ------------------------------------------------------------------------------------


def test_evit_fuses_the_papers_weighted_sum(backend: str) -> None:
    torch.manual_seed(0)
    x, cu = torch.randn(20, 4), offsets([8, 12])
    attention = torch.cat([torch.softmax(torch.randn(n), 0) for n in (8, 12)])
    kept = STRATEGIES["evit"](x, cu, Budget.count(3), attention=attention, backend=backend)
    for b, (begin, end) in enumerate(((0, 8), (8, 20))):
        drop = attention[begin:end].argsort(descending=True)[3:] + begin
        seat = int(kept.assignment[drop].unique())
        torch.testing.assert_close(kept.reduce(x)[seat], (attention[drop, None] * x[drop]).sum(0))
        places = kept.positions(torch.arange(20.0)[:, None], mode="mean")[seat]
        torch.testing.assert_close(places, (attention[drop] * drop).sum()[None] / attention[drop].sum())
        assert kept.cu_seqlens[b + 1] - kept.cu_seqlens[b] == 4


def test_black_frames_are_no_motion() -> None:
    torch.manual_seed(0)
    frame, black = torch.randn(4, 8), torch.zeros(4, 8)
    score = frame_change(torch.cat([frame, frame, black, black, frame, frame * 1e30]), 4).view(6, 4)
    assert score[:, 0].tolist() == pytest.approx([2, 0, 1, 0, 1, 0], abs=1e-6)
    assert (score[[1, 3]] == 0).all()
    assert frame_change(torch.cat([frame, frame * NAN]), 4)[4:].isnan().all()


def test_visionzip_keeps_protected_tokens_before_contextual_ones(backend: str) -> None:
    torch.manual_seed(0)
    x, protected = torch.randn(24, 4), torch.arange(24) % 12 < 6
    kept = STRATEGIES["visionzip"](
        x, offsets([12, 12]), Budget.count(6), attention=torch.rand(24), protected=protected, backend=backend
    )
    assert kept.keep_index.tolist() == [*range(6), *range(12, 18)]


def test_duplicates_go_to_the_lowest_index(backend: str) -> None:
    """Rows that are equal tie exactly on every backend."""
    torch.manual_seed(0)
    for n, width in ((8, 24), (21, 64), (30, 47), (57, 130)):
        x = torch.randn(n, width).repeat(3, 1)[: 2 * n + 3]
        for strategy in ("divprune", "cdpruner"):
            kept = STRATEGIES[strategy](x, offsets([len(x)]), Budget.count(n), backend=backend)
            assert kept.keep_index.tolist() == list(range(n)), (strategy, n)


def test_extreme_rows_are_compared_by_direction(backend: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(12, 16)
    for factor in (1e30, 1e-30):
        long = x * torch.where(torch.arange(12) % 3 == 0, factor, 1.0)[:, None]
        for strategy in ("divprune", "cdpruner", "tome"):
            want = STRATEGIES[strategy](x, offsets([12]), Budget.count(7), backend=backend)
            got = STRATEGIES[strategy](long, offsets([12]), Budget.count(7), backend=backend)
            assert torch.equal(got.assignment, want.assignment), (strategy, factor)


# Refused by name ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tome", "divprune", "cdpruner", "random", "uniform", "pool"])
@pytest.mark.parametrize(
    "budget", [Budget.total(3, by="score"), Budget.threshold(0.1), Budget.mass(0.5), Budget.adaptive()]
)
def test_strategies_without_scores_refuse_budgets_that_need_them(name: str, budget: Budget) -> None:
    with pytest.raises(ValueError, match=rf"budget must be static .* for {name}, which has no scores.*; got"):
        STRATEGIES[name](torch.randn(8, 4), offsets([4, 4]), budget)


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_number_is_no_budget(name: str) -> None:
    needs = {"attention": torch.rand(8)} if name in ("attention", "evit", "visionzip", "prumerge") else {}
    for number, hint in ((0.5, r"Budget.ratio\(0.5\)"), (3, r"Budget.count\(3\)")):
        with pytest.raises(TypeError, match=rf"budget must be a Budget or an int32 tensor.*write {hint}"):
            STRATEGIES[name](torch.randn(8, 4), offsets([4, 4]), number, **needs)
    with pytest.raises(TypeError, match=r"budget must be a tensor of torch\.int32; got torch\.int64"):
        STRATEGIES[name](torch.randn(8, 4), offsets([4, 4]), torch.tensor([1, 2]), **needs)


MAKE: list[Callable[[Any], Budget]] = [
    Budget.count,
    Budget.ratio,
    Budget.total,
    Budget.threshold,
    Budget.mass,
    Budget.adaptive,
    *(lambda v, k=kind: Budget(k, v) for kind in ("count", "ratio", "total", "threshold", "mass", "adaptive")),
    lambda v: Budget("ratio", 0.5, minimum=v),
    lambda v: Budget.mass(0.5, maximum=v),
]


@pytest.mark.parametrize("make", MAKE)
def test_budgets_check_their_numbers(make: Callable[[Any], Budget]) -> None:
    for wrong in (True, "3", torch.tensor(1.0), NAN):
        with pytest.raises((TypeError, ValueError), match=r"must be an int|must be a number|must lie in"):
            make(wrong)
    assert make(np.int64(1)) == make(1)


def test_limits_are_refused_where_they_would_starve_later_sequences() -> None:
    for kind, options in (("count", {"minimum": 5}), ("total", {"minimum": 2}), ("total", {"maximum": 2})):
        with pytest.raises(ValueError, match=f"minimum and maximum are not for a budget of {kind}"):
            Budget(kind, 3, **options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"by must be length or score \(score for a total only\)"):
        Budget("mass", 0.5, by="score")


def test_counts_need_not_be_contiguous(backend: str) -> None:
    counts = torch.tensor([2, 9, 1, 9], dtype=torch.int32)[::2]
    kept = select_tokens(torch.arange(8.0), offsets([4, 4]), counts, backend=backend)
    assert kept.keep_index.tolist() == [2, 3, 7]
    merged = bipartite(torch.randn(8, 3), offsets([4, 4]), counts, backend=backend)
    assert merged.cu_seqlens.diff().tolist() == [2, 3]


META = torch.zeros(8, device="meta")
TWO = Budget.count(2)
WRONG: dict[str, Callable[[torch.Tensor, torch.Tensor], Any]] = {
    "relevance must be on the device": lambda x, cu: STRATEGIES["cdpruner"](x, cu, TWO, relevance=META),
    "relevance must have shape": lambda x, cu: STRATEGIES["cdpruner"](x, cu, TWO, relevance=x[:7, 0]),
    "relevance must be a floating-point tensor; got torch.int64": lambda x, cu: STRATEGIES["cdpruner"](
        x, cu, TWO, relevance=x[:, 0].long()
    ),
    "cu_seqlens must be on the device of scores": lambda x, cu: STRATEGIES["attention"](x, cu, TWO, attention=META),
    "protected must be on the device": lambda x, cu: STRATEGIES["divprune"](x, cu, TWO, protected=META.bool()),
    "sizes must be on the device": lambda x, cu: STRATEGIES["tome"](x, cu, TWO, sizes=META),
    "seed must be an int": lambda x, cu: STRATEGIES["random"](x, cu, TWO, seed=1.5),
    "columns must be at least 1; got 0": lambda x, cu: STRATEGIES["uniform"](x, cu, TWO, columns=0),
    "columns must be an int": lambda x, cu: STRATEGIES["uniform"](x, cu, TWO, columns=True),
    "max_seqlen must be at least .*, 4; got 3": lambda x, cu: STRATEGIES["norm"](x, cu, TWO, max_seqlen=3),
    "budget must be on the device": lambda x, cu: select_tokens(x[:, 0], cu, META[:2].int()),
    "a_index must be on the device of features": lambda x, cu: best_match(x, META.int(), cu, META.int(), cu),
    "merges must be a tensor of torch.int32": lambda x, cu: bipartite(x, cu, torch.ones(2)),
    "merges must be an int": lambda x, cu: bipartite(x, cu, True),
    "features must be on the device": lambda x, cu: nearest(select_tokens(x[:, 0], cu, TWO), x.to("meta")),
    "cu_text must be on the device of image": lambda x, cu: text_relevance(x, x, cu, cu.to("meta")),
    "image and text must have shapes": lambda x, cu: text_relevance(x, x[:, :2], cu, cu),
    "cu_text must have the shape of cu_image": lambda x, cu: text_relevance(x, x, cu, offsets([8])),
    "tokens_per_frame must be an int": lambda x, cu: frame_change(x, True),
    "total must be an int and not negative; got -1": lambda x, cu: frame_counts(x, cu, -1),
}


@pytest.mark.parametrize("words", WRONG)
def test_arguments_are_named(words: str) -> None:
    with pytest.raises((TypeError, ValueError), match=words):
        WRONG[words](torch.randn(8, 3), offsets([4, 4]))


def brightest(tokens: torch.Tensor, cu_seqlens: torch.Tensor, budget: Budget, **options: Any) -> Selection:
    """A strategy that takes `protected` and forgets it."""
    return select_tokens(tokens.float().mean(1), cu_seqlens, budget)


def test_a_strategy_that_drops_protected_tokens_is_refused() -> None:
    x = torch.randn(4, 10, 8)
    x[:, 0] = -5
    with pytest.raises(
        ValueError, match="strategy brightest must keep protected tokens; it dropped 1 of sequence 0: pass"
    ):
        TokenPruner(0.3, strategy=brightest, protected=1)(x)
    TokenPruner(0.3, strategy=brightest)(x)
    TokenPruner(1.0, strategy=brightest, protected=1)(x)
    with pytest.raises(TypeError, match="strategy <lambda> must return a Selection; got int"):
        TokenPruner(0.3, strategy=lambda *a, **o: 3, protected=1)(x)  # type: ignore[arg-type, return-value]
    scores, cu, first = torch.arange(4.0), offsets([4]), torch.arange(4) < 1
    check_selection("mine", select_tokens(scores, cu, Budget.count(2), protected=first), cu, 4, protected=first)
    more = torch.arange(4) < 3
    check_selection("mine", select_tokens(scores, cu, Budget.count(2), protected=more), cu, 4, protected=more)
    names_none = select_tokens(scores, cu, Budget.count(2))
    with pytest.raises(ValueError, match="strategy mine must keep protected tokens; its selection names none"):
        check_selection("mine", names_none, cu, 4, protected=first.to("meta"))


@pytest.mark.parametrize("name", STRATEGIES)
def test_every_strategy_keeps_protected_tokens(name: str, backend: str) -> None:
    torch.manual_seed(0)
    x, attention, cu = torch.randn(60, 6), torch.rand(60), offsets([20, 1, 39])
    for few in (1, 3, 9):
        protected = torch.rand(60) < few / 20
        needs = {"attention": attention} if name in ("attention", "evit", "visionzip", "prumerge") else {}
        kept = STRATEGIES[name](x, cu, Budget.count(6), protected=protected, backend=backend, **needs)
        check_selection(name, kept, cu, x.shape[0], Budget.count(6), protected)


def test_pooled_patches_never_join_protected_tokens(backend: str) -> None:
    x, protected = torch.randn(10, 3), torch.arange(10) < 2
    kept = STRATEGIES["pool"](x, offsets([10]), Budget.count(2), columns=4, protected=protected, backend=backend)
    assert kept.assignment.tolist() == [0, 1] + [-1] * 8
    assert torch.equal(kept.reduce(x), x[:2])
