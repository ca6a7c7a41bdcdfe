"""Selection, budgets and the way back, against plain Python, on every backend and instruction set."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fastxattn
from fastxattn.ops.pruning import (
    STRATEGIES,
    Budget,
    Selection,
    best_match,
    gather_rows,
    merge_rows,
    prune_tokens,
    reference,
    select_tokens,
)
from fastxattn.ops.pruning.backends import run
from fastxattn.ops.pruning.problem import Quantile, Select
from fastxattn.ops.pruning.segments import share
from fastxattn.runtime import env, native, triton
from fastxattn.testing import offsets

ISAS = native.available_cpu_isas()
SPECIAL = [float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1.0, 1.0, -1.0, 1e-40, 0.5]


def expected(scores: list[float], lengths: list[int], counts: list[int], protected: list[bool]) -> list[int]:
    """The rules, in plain Python."""
    kept, begin = [], 0
    for n, k in zip(lengths, counts, strict=True):
        rows = range(begin, begin + n)
        ranked = sorted(
            rows, key=lambda i: (not protected[i], math.isnan(scores[i]), 0 if math.isnan(scores[i]) else -scores[i], i)
        )
        kept += sorted(ranked[: max(k, 0)])
        begin += n
    return kept


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_selection_follows_the_rules_everywhere(data: st.DataObject) -> None:
    lengths = data.draw(st.lists(st.integers(0, 40), max_size=5))
    total = sum(lengths)
    value = st.sampled_from(SPECIAL) | st.floats(-4, 4, width=32)
    scores = data.draw(st.lists(value, min_size=total, max_size=total))
    counts = data.draw(st.lists(st.integers(-1, 45), min_size=len(lengths), max_size=len(lengths)))
    protected = data.draw(st.lists(st.booleans(), min_size=total, max_size=total) | st.just([False] * total))
    want = expected(scores, lengths, counts, protected)
    x = torch.arange(total * 3, dtype=torch.float32).reshape(total, 3)
    for name in ("reference", "cpu") if ISAS else ("reference",):
        rows, got = prune_tokens(
            x,
            torch.tensor(scores),
            offsets(lengths),
            torch.tensor(counts, dtype=torch.int32),
            protected=torch.tensor(protected, dtype=torch.bool),
            backend=name,
        )
        assert got.keep_index.tolist() == want, name
        assert torch.equal(rows, x[torch.tensor(want, dtype=torch.long)])
        clipped = [min(max(k, 0), n) for k, n in zip(counts, lengths, strict=True)]
        assert got.cu_seqlens.tolist() == offsets(clipped).tolist()
        places = [want.index(i) if i in want else -1 for i in range(total)]
        assert got.assignment.tolist() == places


def test_large_segments_and_ranks(backend: str) -> None:
    torch.manual_seed(0)
    scores = torch.randn(5000).round(decimals=1)
    scores[::11] = float("nan")
    cu = offsets([3000, 0, 1, 1999])
    kept = select_tokens(scores, cu, Budget.count(700), backend=backend)
    want = expected(scores.tolist(), [3000, 0, 1, 1999], [700] * 4, [False] * 5000)
    assert kept.keep_index.tolist() == want
    for b in range(4):
        part = kept.rank[kept.cu_seqlens[b] : kept.cu_seqlens[b + 1]]
        assert sorted(part.tolist()) == list(range(part.numel()))
        order = reference.order(scores[cu[b] : cu[b + 1]])[: part.numel()] + cu[b]
        assert torch.equal(
            kept.keep_index[kept.cu_seqlens[b] : kept.cu_seqlens[b + 1]][part.argsort()], order.to(torch.int32)
        )


def test_a_sequence_does_not_notice_its_neighbours(backend: str) -> None:
    torch.manual_seed(1)
    alone, noise = torch.randn(50), torch.full((30,), float("nan"))
    single = select_tokens(alone, offsets([50]), Budget.ratio(0.3), backend=backend)
    among = select_tokens(torch.cat([noise, alone, noise]), offsets([30, 50, 30]), Budget.ratio(0.3), backend=backend)
    middle = among.keep_index[among.cu_seqlens[1] : among.cu_seqlens[2]] - 30
    assert torch.equal(middle, single.keep_index)


def test_more_protected_than_k_keeps_the_best_protected(backend: str) -> None:
    scores = torch.tensor([0.0, 3.0, 1.0, 2.0, 9.0])
    protected = torch.tensor([True, True, True, True, False])
    kept = select_tokens(scores, offsets([5]), Budget.count(2), protected=protected, backend=backend)
    assert kept.keep_index.tolist() == [1, 3]


def test_rows_beyond_the_last_sequence_are_never_kept(backend: str) -> None:
    scores = torch.tensor([1.0, 2.0, float("nan"), 99.0])
    rows, kept = prune_tokens(torch.full((4, 2), torch.nan), scores, offsets([2]), Budget.ratio(1.0), backend=backend)
    assert kept.keep_index.tolist() == [0, 1] and kept.assignment.tolist() == [0, 1, -1, -1]
    assert rows.shape == (2, 2)


def test_capacity_bounds_the_result_and_pads_with_minus_one(backend: str) -> None:
    counts = torch.tensor([2, 2], dtype=torch.int32)
    select = Select.positional(reference.select) if backend == "reference" else torch.ops.fastxattn.pruning_select_cpu
    x = torch.ones(6, 2)
    index, cu, _, rows = select(torch.arange(6.0), offsets([3, 3]), counts, None, x, 6)
    assert index.tolist() == [1, 2, 4, 5, -1, -1] and rows[4:].abs().sum() == 0
    index, cu, assignment, _ = select(torch.arange(6.0), offsets([3, 3]), counts, None, None, 3)
    assert cu.tolist() == [0, 2, 3] and index.tolist() == [1, 2, 5] and assignment.tolist() == [-1, 0, 1, -1, -1, 2]


# Budgets -------------------------------------------------------------------------------------------------------

SCORES = torch.tensor([0.5, 0.1, 0.2, 0.2, float("nan"), 4.0, 1.0, 1.0, 1.0, 1.0])
CU = offsets([5, 0, 5])


@pytest.mark.parametrize(
    ("budget", "counts"),
    [
        (Budget.count(3), [3, 0, 3]),
        (Budget.count(0), [0, 0, 0]),
        (Budget.count(99), [5, 0, 5]),
        (Budget.ratio(0.5), [3, 0, 3]),
        (Budget.ratio(0.0), [0, 0, 0]),
        (Budget.ratio(1.0), [5, 0, 5]),
        (Budget.ratio(0.2), [1, 0, 1]),
        (Budget.total(5), [3, 0, 2]),
        (Budget.total(5, by="score"), [0, 0, 5]),
        (Budget.total(6, by="score"), [1, 0, 5]),
        (Budget.total(100), [5, 0, 5]),
        (Budget.threshold(0.2), [3, 0, 5]),
        (Budget.threshold(2.0, minimum=2), [2, 0, 2]),
        (Budget.threshold(-1.0, maximum=3), [3, 0, 3]),
        (Budget.mass(0.49), [1, 0, 1]),
        (Budget.mass(0.51), [2, 0, 2]),
        (Budget.mass(1.0), [4, 0, 5]),
        (Budget.mass(0.0), [0, 0, 0]),
        (Budget.adaptive(1.5), [1, 0, 1]),
    ],
)
def test_budget_counts(budget: Budget, counts: list[int], backend: str) -> None:
    got = budget.counts(SCORES, CU, backend=backend)
    assert got.dtype == torch.int32 and got.tolist() == counts
    assert sum(counts) <= budget.capacity(10, 3, 5) and budget.static == (budget.kind in ("count", "ratio", "total"))
    assert select_tokens(SCORES, CU, budget, backend=backend).cu_seqlens.diff().tolist() == counts


def test_dynamic_budgets_keep_protected_in_addition() -> None:
    protected = torch.zeros(10, dtype=torch.bool)
    protected[[1, 9]] = True
    assert Budget.threshold(0.5).counts(SCORES, CU, protected).tolist() == [2, 0, 5]
    assert Budget.mass(0.5).counts(SCORES, CU, protected).tolist() == [2, 0, 2]


def test_quantiles_agree_with_torch(backend: str) -> None:
    torch.manual_seed(0)
    scores = torch.randn(400)
    scores[5] = float("nan")
    cu, q = offsets([3, 0, 300, 1, 90]), torch.tensor([0.0, 0.1, 0.25, 0.5, 0.9, 1.0])
    got = run(Quantile(scores=scores, cu_seqlens=cu, q=q), backend)
    for b in range(5):
        part = scores[cu[b] : cu[b + 1]]
        if part.numel() == 0:
            assert got[b].isnan().all()
            continue
        want = torch.nanquantile(part.double(), q.double())
        torch.testing.assert_close(got[b].double(), want, rtol=0, atol=3e-7)


@settings(max_examples=100, deadline=None)
@given(
    total=st.integers(0, 200),
    parts=st.lists(st.tuples(st.floats(0, 10) | st.just(math.nan), st.integers(0, 40)), min_size=1, max_size=6),
)
def test_share_uses_everything_it_can(total: int, parts: list[tuple[float, int]]) -> None:
    weights, limits = torch.tensor([p[0] for p in parts]), torch.tensor([p[1] for p in parts])
    got = share(total, weights, limits)
    assert int(got.sum()) == min(total, int(limits.sum()))
    assert bool((got <= limits).all()) and bool((got >= 0).all())


# There and back ------------------------------------------------------------------------------------------------


def small() -> tuple[torch.Tensor, Selection]:
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0], [7.0, 8.0]], dtype=torch.float64, requires_grad=True)
    kept = select_tokens(torch.tensor([1.0, 0.0, 2.0, 0.5]), offsets([4]), Budget.count(2))
    return x, kept


def test_scatter_back_fills() -> None:
    x, kept = small()
    y = torch.tensor([[10.0, 20.0], [30.0, 40.0]], dtype=torch.float64)
    assert kept.scatter_back(y, fill="zero").tolist() == [[10, 20], [0, 0], [30, 40], [0, 0]]
    assert kept.scatter_back(y, x).tolist() == [[10, 20], [3, 4], [30, 40], [7, 8]]
    assert kept.scatter_back(y, x, fill="residual").tolist() == [[10, 20], [3, 4], [30, 40], [7, 8]]
    merged = kept.merged(torch.tensor([0, 0, 1, 1], dtype=torch.int32), torch.tensor([1.0, 3.0, 1.0, 1.0]))
    assert merged.reduce(x).tolist() == [[2.5, 3.5], [6, 7]]
    assert merged.sizes().tolist() == [2, 2] and merged.key_bias().tolist() == pytest.approx([math.log(2)] * 2)
    assert merged.scatter_back(y, fill="zero").tolist() == [[10, 20], [10, 20], [30, 40], [30, 40]]
    back = merged.scatter_back(merged.reduce(x) + 1, x, fill="residual")
    torch.testing.assert_close(back, x + 1)


def test_positions() -> None:
    _, kept = small()
    assert kept.positions().tolist() == [0, 2] and kept.positions(mode="compact").tolist() == [0, 1]
    grid = torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1]])
    assert kept.positions(grid).tolist() == [[0, 0], [1, 0]]
    merged = kept.merged(torch.tensor([0, 0, 1, 1], dtype=torch.int32), torch.ones(4))
    assert merged.positions(grid, mode="mean").tolist() == [[0, 0.5], [1, 0.5]]
    # A scheme of one's own: rows and columns renumbered without gaps.
    dense = kept.positions(grid * 5, mode=lambda s, p: torch.unique(s.gather(p.float())[:, 0], return_inverse=True)[1])
    assert dense.tolist() == [0, 1]
    with pytest.raises(ValueError, match="mode must be a function or one of"):
        kept.positions(mode="spread")


def test_gradients_of_everything() -> None:
    x, kept = small()
    merged = kept.merged(torch.tensor([0, 0, 1, -1], dtype=torch.int32), torch.tensor([1.0, 3.0, 1.0, 1.0]))

    def whole(t: torch.Tensor) -> torch.Tensor:
        return torch.cat(
            [
                kept.gather(t),
                merged.reduce(t),
                merged.scatter_back(merged.reduce(t) ** 2, t, fill="residual"),
                kept.scatter_back(kept.gather(t) ** 2, t, fill="copy"),
                kept.scatter_back(kept.gather(t) ** 2, fill="zero"),
            ]
        )

    assert torch.autograd.gradcheck(whole, x)


def test_weight_gradients() -> None:
    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    c = torch.rand(5, dtype=torch.float64, requires_grad=True)
    a = torch.tensor([0, 1, 0, -1, 1], dtype=torch.int32)
    assert torch.autograd.gradcheck(lambda t, w: merge_rows(t, a, w, 3), (x, c))
    assert torch.autograd.gradcheck(lambda t, w: gather_rows(t, a, w), (x, c))


def test_gradients_of_merge_weights_are_finite_where_tokens_are_dropped() -> None:
    _, kept = small()
    weight = torch.tensor([1.0, 3.0, 0.0, 2.0], requires_grad=True)
    x = torch.randn(4, 2)
    place = torch.tensor([0, 0, 1, -1], dtype=torch.int32)
    (grad,) = torch.autograd.grad(kept.merged(place, weight).reduce(x)[0].sum(), weight)
    want = (x[1] - x[0]).sum() * torch.tensor([-3.0, 1.0]) / 16
    torch.testing.assert_close(grad[:2], want)
    assert grad[2:].tolist() == [0, 0]


def test_nan_in_pruned_tokens_reaches_nothing(backend: str) -> None:
    x = torch.randn(6, 5)
    x[1] = float("nan")
    x.requires_grad_()
    rows, kept = prune_tokens(x, torch.tensor([3.0, 0, 2, 0, 1, 0]), offsets([6]), Budget.count(3), backend=backend)
    (grad,) = torch.autograd.grad((rows**2).sum(), x)
    assert rows.isfinite().all() and grad.isfinite().all()
    assert kept.scatter_back(rows, fill="zero").isfinite().all()


def test_compiles_without_breaks() -> None:
    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(x: torch.Tensor, scores: torch.Tensor, cu: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        rows, kept = prune_tokens(x, scores, cu, Budget.count(4), max_seqlen=8)
        return kept.scatter_back(rows * 2, x), kept.keep_index

    x = torch.randn(16, 8, requires_grad=True)
    scores, cu = torch.randn(16), offsets([8, 8])
    out, index = step(x, scores, cu)
    rows, kept = prune_tokens(x, scores, cu, Budget.count(4))
    assert torch.equal(index, kept.keep_index) and torch.equal(out, kept.scatter_back(rows * 2, x))
    assert torch.autograd.grad(out.sum(), x)[0].isfinite().all()


@pytest.mark.skipif(not ISAS, reason="the CPU kernels are not built")
def test_operators_pass_opcheck() -> None:
    scores, cu, counts = torch.randn(6), offsets([4, 2]), torch.tensor([2, 1], dtype=torch.int32)
    x, index = torch.randn(6, 3), torch.tensor([0, -1, 4], dtype=torch.int32)
    place = torch.tensor([0, 1, -1, 0, 1, 1], dtype=torch.int32)
    rows_a, rows_b = torch.tensor([0, 2, 4], dtype=torch.int32), torch.tensor([1, 3, 5], dtype=torch.int32)
    ops = torch.ops.fastxattn
    torch.library.opcheck(ops.pruning_select_cpu.default, (scores, cu, counts, None, x, 3))
    torch.library.opcheck(ops.pruning_gather_cpu.default, (x, index, None))
    torch.library.opcheck(ops.pruning_merge_cpu.default, (x, place, None, 2))
    torch.library.opcheck(ops.pruning_match_cpu.default, (x, rows_a, offsets([2, 1]), rows_b, offsets([2, 1])))
    torch.library.opcheck(ops.pruning_greedy_cpu.default, (x, None, cu, counts, None, 0, 9))
    torch.library.opcheck(ops.pruning_quantile_cpu.default, (scores, cu, torch.tensor([0.5])))


@pytest.mark.skipif(not ISAS, reason="the CPU kernels are not built")
def test_results_do_not_depend_on_threads() -> None:
    torch.manual_seed(0)
    x, cu = torch.randn(900, 40), offsets([300, 250, 350])
    before, results = torch.get_num_threads(), []
    for threads in (1, 2, 4):
        torch.set_num_threads(threads)
        rows, kept = prune_tokens(x, x[:, 0], cu, Budget.ratio(0.3), backend="cpu")
        place = (torch.arange(900) % 17).to(torch.int32)
        merged = torch.ops.fastxattn.pruning_merge_cpu(x, place, None, 17)
        index = torch.arange(900, dtype=torch.int32)
        match = torch.ops.fastxattn.pruning_match_cpu(x, index, cu, index, cu)
        results.append((rows, kept.keep_index, merged, *match))
    torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


# Bad input -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"scores": torch.zeros(4, dtype=torch.int64)}, TypeError, "scores must be a floating-point"),
        ({"scores": torch.zeros(2, 2)}, ValueError, r"scores must have shape \(total,\)"),
        ({"cu_seqlens": torch.tensor([0, 4])}, TypeError, "cu_seqlens must be int32"),
        ({"cu_seqlens": torch.tensor([1, 4], dtype=torch.int32)}, ValueError, "start at 0; got 1"),
        ({"cu_seqlens": torch.tensor([0, 3, 2], dtype=torch.int32)}, ValueError, "must not decrease"),
        ({"cu_seqlens": torch.tensor([0, 5], dtype=torch.int32)}, ValueError, "end within the 4 rows.*got 5"),
        ({"protected": torch.zeros(3, dtype=torch.bool)}, ValueError, r"protected must have shape \(4,\)"),
        ({"protected": torch.zeros(4)}, TypeError, "protected must be a tensor of torch.bool"),
        ({"budget": 3}, TypeError, "budget must be a Budget"),
        ({"budget": torch.zeros(2, dtype=torch.int32)}, ValueError, r"budget must have shape \(1,\)"),
        ({"backend": "metal"}, ValueError, "backend must be auto or one of"),
    ],
)
def test_bad_input_is_named(change: dict[str, object], error: type[Exception], words: str) -> None:
    good: dict[str, object] = {"scores": torch.zeros(4), "cu_seqlens": offsets([4]), "budget": Budget.count(1)}
    with pytest.raises(error, match=words):
        select_tokens(**{**good, **change})  # type: ignore[arg-type]


def test_bad_budgets_are_named() -> None:
    for make, words in (
        (lambda: Budget.count(-1), "k must not be negative"),
        (lambda: Budget.ratio(1.5), "r must lie in"),
        (lambda: Budget.mass(-0.1), "p must lie in"),
        (lambda: Budget.threshold(math.nan), "t must lie in"),
        (lambda: Budget.total(-1), "n must not be negative"),
        (lambda: Budget.mass(0.5, minimum=-2), "minimum must not be negative"),
        (lambda: Budget.mass(0.5, minimum=3, maximum=2), "maximum must be at least the minimum, 3; got 2"),
        (lambda: Budget("most", 3), "kind must be one of"),
        (lambda: Budget.total(3, by="luck"), "by must be length or score"),
    ):
        with pytest.raises(ValueError, match=words):
            make()
    with pytest.raises(TypeError, match="k must be an int"):
        Budget.count(0.5)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="n must be an int"):
        Budget.total(2.5)  # type: ignore[arg-type]


def test_bad_rows_are_refused_before_memory_is_touched() -> None:
    _, kept = small()
    with pytest.raises(ValueError, match="x must have 4 rows"):
        kept.gather(torch.zeros(5, 2))
    with pytest.raises(ValueError, match="fill must be one of"):
        kept.scatter_back(torch.zeros(2, 2), fill="mirror")
    with pytest.raises(ValueError, match="source must be given"):
        kept.scatter_back(torch.zeros(2, 2))
    if ISAS:
        with pytest.raises(RuntimeError, match=r"index must lie in \[-1, 4\)"):
            torch.ops.fastxattn.pruning_gather_cpu(torch.zeros(4, 2), torch.tensor([4], dtype=torch.int32), None)


def test_the_interpreter_leaves_cpu_tensors_to_the_compiled_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton, "interpreted", lambda: True)
    x, cu = torch.randn(6, 3), offsets([6])
    index = torch.zeros(6, dtype=torch.int32)
    for call in (
        lambda: select_tokens(x[:, 0], cu, Budget.count(2)),
        lambda: prune_tokens(x, x[:, 0], cu, Budget.count(2)),
        lambda: gather_rows(x, index),
        lambda: merge_rows(x, index, None, 2),
        lambda: best_match(x, index, cu, index, cu),
        lambda: STRATEGIES["divprune"](x, cu, Budget.count(2)),
        lambda: Budget.adaptive().counts(x[:, 0].contiguous(), cu),
    ):
        verdicts = fastxattn.explain(call).verdicts
        assert next(v.backend for v in verdicts if v.reason is None) == ("cpu" if ISAS else "triton"), verdicts
        assert [v.backend for v in verdicts if v.backend != "cuda"] == ["cpu", "triton", "reference"]


def test_reasons_are_those_of_every_operation() -> None:
    wide = torch.zeros(4, 2, dtype=torch.float64)
    reasons = {v.backend: v.reason for v in fastxattn.explain(merge_rows, wide, torch.zeros(4).int(), None, 1).verdicts}
    assert reasons["cuda"] == reasons["cpu"] == "it computes in float32, and the tensors are float64"
    reasons = {v.backend: v.reason for v in fastxattn.explain(gather_rows, wide.float(), torch.zeros(4).int()).verdicts}
    assert reasons["triton"] in (None, "the tensors are on cpu, and TRITON_INTERPRET=1 is not set")
    with pytest.raises(RuntimeError, match="cannot run this problem: the tensors are on cpu"):
        merge_rows(wide.float(), torch.zeros(4).int(), None, 1, backend="cuda")
    tiny = torch.zeros(4, 2, dtype=torch.float8_e4m3fn)
    with pytest.raises(RuntimeError, match=r"float32, bfloat16 and float16, and the tensors are float8_e4m3fn"):
        gather_rows(tiny, torch.zeros(4).int(), backend="cpu")


@pytest.mark.parametrize("name", ["cuda", "flash"])
def test_a_default_backend_that_an_operation_lacks_is_refused_by_its_variable(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(env, "default_backend", name)
    x, cu = torch.randn(6, 3), offsets([6])
    words = (
        f"environment variable FASTXATTN_BACKEND={name} names a backend that this operation lacks; it has cpu, triton"
    )
    for call in (
        lambda: gather_rows(x, torch.zeros(6).int()),
        lambda: STRATEGIES["cdpruner"](x, cu, Budget.count(2)),
        lambda: select_tokens(x[:, 0], cu, Budget.adaptive()),
    ):
        with pytest.raises(ValueError, match=words):
            call()
