"""Merging, matching, greedy searches and strategies, against plain loops, on every backend and instruction set."""

from __future__ import annotations

import itertools

import pytest
import torch

from fastxattn import varlen_cross_attention
from fastxattn.ops.pruning import (
    STRATEGIES,
    Budget,
    best_match,
    bipartite,
    frame_change,
    frame_counts,
    leftover,
    nearest,
    probe_scores,
    received_scores,
    reference,
    select_tokens,
    text_relevance,
)
from fastxattn.ops.pruning.backends import run
from fastxattn.ops.pruning.problem import DETERMINANT, MAX_MIN, Greedy, Match
from fastxattn.runtime import native
from fastxattn.testing import offsets

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def awkward(total: int, width: int) -> torch.Tensor:
    """Random rows with a zero row, duplicates and a NaN row among them."""
    torch.manual_seed(total)
    x = torch.randn(total, width)
    x[total // 3], x[total // 2], x[-1] = 0, x[1], float("nan")
    return x


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("lengths", "width"), [([90, 1, 0, 140], 33), ([5], 1), ([200, 64], 64)])
def test_matching_agrees_with_the_oracle(backend: str, dtype: torch.dtype, lengths: list[int], width: int) -> None:
    total = sum(lengths)
    x, every = awkward(total, width).to(dtype), torch.arange(total, dtype=torch.int32)
    cu = offsets(lengths)
    odd = [n // 2 for n in lengths]
    places = torch.cat([torch.arange(b, b + 2 * k, 2) + 1 for b, k in zip(cu.tolist(), odd, strict=False)])
    best, similarity = best_match(x, every, cu, places.to(torch.int32), offsets(odd), backend=backend)
    problem = Match(x=x, a_index=every, cu_a=cu, b_index=places.to(torch.int32), cu_b=offsets(odd))
    want, exact = reference.match(problem)
    # A different choice is allowed only between similarities that differ by rounding.
    chosen = (reference.unit_rows(x) * reference.unit_rows(x)[best.clamp_min(0).long()]).sum(1)
    differs = best != want
    assert bool(((chosen - exact.double()).abs()[differs] < 1e-6).all()) and int(differs.sum()) <= 1 + total // 50
    torch.testing.assert_close(similarity, exact, rtol=0, atol=1e-6, equal_nan=True)


def test_matching_ties_go_to_the_first(backend: str) -> None:
    x = torch.tensor([[1.0, 0], [0, 2], [3, 0], [5, 0], [0, 1]])
    a, b = torch.tensor([0, 1], dtype=torch.int32), torch.tensor([4, 2, 3], dtype=torch.int32)
    best, similarity = best_match(x, a, offsets([2]), b, offsets([3]), backend=backend)
    assert best.tolist() == [2, 4] and similarity.tolist() == [1, 1]


def brute_max_min(x: torch.Tensor, count: int) -> list[int]:
    unit = torch.nn.functional.normalize(x.double(), dim=1)
    distance = 1 - unit @ unit.T
    others = distance + torch.eye(len(x)) * 9
    picked = [int(others.amin(1).argmax())]
    while len(picked) < count:
        near = distance[:, picked].amin(1)
        near[picked] = -1
        picked.append(int(near.argmax()))
    return picked


def brute_determinant(x: torch.Tensor, q: torch.Tensor, count: int) -> list[int]:
    unit = torch.nn.functional.normalize(x.double(), dim=1)
    kernel = unit @ unit.T * q.double() * q.double()[:, None]
    picked: list[int] = []
    while len(picked) < count:
        volumes = [
            -1.0 if i in picked else float(torch.linalg.det(kernel[[*picked, i]][:, [*picked, i]]))
            for i in range(len(x))
        ]
        picked.append(int(torch.tensor(volumes).argmax()))
    return picked


@pytest.mark.parametrize("mode", [MAX_MIN, DETERMINANT])
def test_greedy_search_is_the_definition(backend: str, mode: int) -> None:
    torch.manual_seed(0)
    lengths, width, count = [70, 30], 24, 9
    x, q, cu = torch.randn(100, width), torch.rand(100) + 0.5, offsets(lengths)
    counts = torch.tensor([count, count], dtype=torch.int32)
    scores = run(Greedy.of((x, q, cu, counts, None, mode, 99)), backend)
    for b in range(2):
        part = slice(int(cu[b]), int(cu[b + 1]))
        want = brute_max_min(x[part], count) if mode == MAX_MIN else brute_determinant(x[part], q[part], count)
        order = torch.argsort(scores[part], descending=True, stable=True)[:count]
        assert order.tolist() == want


@pytest.mark.parametrize("mode", [MAX_MIN, DETERMINANT])
@pytest.mark.parametrize("dtype", DTYPES)
def test_greedy_rules_on_awkward_rows(backend: str, mode: int, dtype: torch.dtype) -> None:
    x, cu = awkward(120, 17).to(dtype), offsets([50, 0, 1, 69])
    protected = torch.zeros(120, dtype=torch.bool)
    protected[[3, 40]] = True
    for guard, limit in itertools.product((None, protected), (99, 4)):
        counts = torch.tensor([7, 3, 2, 69], dtype=torch.int32)
        problem = Greedy.of((x, None, cu, counts, guard, mode, limit))
        got = run(problem, backend)
        assert torch.equal(got, reference.greedy(problem))
        picks = (got > -torch.inf).split([50, 0, 1, 69])
        assert [int(p.sum()) for p in picks] == [min(k, limit) for k in (7, 0, 1, 69)]
        if guard is not None:
            assert got[3] == 0 and got[40] == -1
        if limit == 99:
            assert got[119] == -68  # the NaN row comes last


@pytest.mark.parametrize("mode", [MAX_MIN, DETERMINANT])
def test_greedy_may_be_asked_for_nothing(backend: str, mode: int) -> None:
    counts = torch.tensor([0, 2], dtype=torch.int32)
    x = torch.randn(8, 5, generator=torch.Generator().manual_seed(0))
    scores = run(Greedy.of((x, None, offsets([5, 3]), counts, None, mode, 2)), backend)
    assert (scores[:5] == -torch.inf).all()
    assert (scores[5:] > -torch.inf).sum() == 2


def test_long_sequences_recompute_similarities() -> None:
    """Beyond 4096 tokens no similarity matrix is stored; the picks are those of the definition."""
    torch.manual_seed(0)
    x = torch.randn(4200, 8)
    counts = torch.tensor([6], dtype=torch.int32)
    if not native.available_cpu_isas():
        pytest.skip("the CPU kernels are not built")
    for mode in (MAX_MIN, DETERMINANT):
        problem = Greedy.of((x, None, offsets([4200]), counts, None, mode, 6))
        assert torch.equal(run(problem, "cpu"), reference.greedy(problem))


def test_bipartite_is_tome(backend: str) -> None:
    """Against ToMe's own formulation: even against odd, argsort, scatter."""
    torch.manual_seed(0)
    n, r = 40, 12
    x, sizes = torch.randn(n, 16), torch.randint(1, 5, (n,)).float()
    merged = bipartite(x, offsets([n]), r, sizes=sizes, backend=backend)
    unit = torch.nn.functional.normalize(x.double(), dim=1)
    best, to = (unit[::2] @ unit[1::2].T).max(1)
    source = best.argsort(descending=True)[:r]
    total, weight = {i: x[i] * sizes[i] for i in range(n)}, {i: float(sizes[i]) for i in range(n)}
    for i in source.tolist():
        target = 2 * int(to[i]) + 1
        total[target] = total[target] + total.pop(2 * i)
        weight[target] += weight.pop(2 * i)
    assert merged.keep_index.tolist() == sorted(total)
    want = torch.stack([total[i] / weight[i] for i in sorted(total)])
    torch.testing.assert_close(merged.reduce(x), want)
    assert merged.sizes(sizes).tolist() == [weight[i] for i in sorted(total)]
    back = merged.scatter_back(merged.reduce(x), fill="zero")
    assert all(torch.equal(back[2 * i], back[2 * int(to[i]) + 1]) for i in source.tolist())  # unmerge


def test_bipartite_limits(backend: str) -> None:
    x = torch.randn(9, 4)
    assert bipartite(x, offsets([5, 0, 1, 3]), 99, backend=backend).cu_seqlens.tolist() == [0, 2, 2, 3, 4]
    protected = torch.zeros(9, dtype=torch.bool)
    protected[0] = True
    kept = bipartite(x, offsets([9]), 99, protected=protected, backend=backend)
    assert kept.keep_index.tolist() == [0, 2, 4, 6, 8] and kept.sizes()[0] == 1
    assert bipartite(x, offsets([9]), 0, backend=backend).keep_index.tolist() == list(range(9))


def test_proportional_attention_equals_attention_over_duplicates() -> None:
    """log(size) as key bias: attending to a merged pair of equal tokens is attending to both."""
    torch.manual_seed(0)
    tokens = torch.randn(4, 1, 8)
    doubled = tokens.repeat_interleave(2, 0)
    merged = bipartite(doubled.squeeze(1), offsets([8]), 4)
    query = torch.randn(3, 1, 8)
    want = varlen_cross_attention(query, doubled, doubled, offsets([3]), offsets([8]), 3, 8)
    fewer = merged.reduce(doubled)
    got = varlen_cross_attention(
        query, fewer, fewer, offsets([3]), merged.cu_seqlens, 3, merged.max_seqlen, key_bias=merged.key_bias()
    )
    assert merged.rows == 4
    torch.testing.assert_close(got, want)


def test_attention_takes_the_selection_without_a_copy() -> None:
    torch.manual_seed(0)
    key, value, query = torch.randn(20, 2, 8), torch.randn(20, 2, 8), torch.randn(6, 2, 8)
    cu, cu_q = offsets([12, 8]), offsets([2, 4])
    kept = select_tokens(torch.randn(20), cu, Budget.count(5))
    key[kept.assignment < 0] = float("nan")
    got = varlen_cross_attention(
        query, key, value, cu_q, kept.cu_seqlens, 4, kept.max_seqlen, key_index=kept.keep_index
    )
    want = varlen_cross_attention(query, kept.gather(key), kept.gather(value), cu_q, kept.cu_seqlens, 4, 5)
    torch.testing.assert_close(got, want)


def test_leftover_and_nearest_account_for_every_token(backend: str) -> None:
    torch.manual_seed(0)
    x, scores, cu = torch.randn(30, 6), torch.rand(30), offsets([12, 0, 18])
    kept = select_tokens(scores, cu, Budget.count(4), backend=backend)
    one_more = leftover(kept, backend=backend)
    assert one_more.cu_seqlens.tolist() == [0, 5, 5, 10] and one_more.sizes().sum() == 30
    dropped = (kept.assignment < 0) & (torch.arange(30) < 12)
    want = (x * scores[:, None])[dropped].sum(0)
    seat = one_more.assignment[dropped].unique()
    torch.testing.assert_close(one_more.reduce(x)[seat].squeeze(0), want)
    average = leftover(kept, average=True, backend=backend).reduce(x)[seat].squeeze(0)
    torch.testing.assert_close(average, want / scores[dropped].sum())
    near = nearest(kept, x, backend=backend)
    assert near.keep_index.tolist() == kept.keep_index.tolist() and near.sizes().sum() == 30
    x[5] = float("nan")
    assert kept.assignment[5] >= 0 or nearest(kept, x, backend=backend).reduce(x).isfinite().all()


@pytest.mark.parametrize("name", STRATEGIES)
def test_every_strategy_on_ragged_batches(name: str, backend: str) -> None:
    torch.manual_seed(3)
    lengths = [33, 0, 1, 50]
    x, cu = torch.randn(84, 12, requires_grad=True), offsets(lengths)
    needs = {"attention": torch.rand(84)} if "attention" in STRATEGIES[name].needs else {}
    kept = STRATEGIES[name](x, cu, Budget.count(30), backend=backend, **needs)
    again = STRATEGIES[name](x, cu, Budget.count(30), backend=backend, **needs)
    assert torch.equal(kept.keep_index, again.keep_index)
    want = [31, 0, 1, 31] if name == "evit" else [30, 0, 1, 30]
    assert kept.cu_seqlens.diff().tolist() == want
    index = kept.keep_index.tolist()
    assert index == sorted(set(index))
    rows = kept.reduce(x)
    (grad,) = torch.autograd.grad(rows.square().sum(), x)
    assert rows.isfinite().all() and bool((grad.abs().sum(1)[kept.keep_index.long()] > 0).all())
    # Alone or among neighbours: the same tokens.
    if name != "random":
        alone = {k: v[34:] for k, v in needs.items()}
        single = STRATEGIES[name](x[34:], offsets([50]), Budget.count(30), backend=backend, **alone)
        assert (single.keep_index + 34).tolist() == index[kept.cu_seqlens[3] : kept.cu_seqlens[4]]


def test_the_uniform_grid_spreads_over_both_axes(backend: str) -> None:
    """No row or column is crowded or left out; a quarter in sequence order would be whole columns."""
    lengths, widths = [16 * 32, 12 * 12], torch.tensor([32, 12])
    x, cu = torch.randn(656, 4), offsets(lengths)
    kept = STRATEGIES["uniform"](x, cu, Budget.ratio(0.25), columns=widths, backend=backend)
    assert kept.cu_seqlens.diff().tolist() == [128, 36]
    mask = (kept.assignment >= 0)[:512].view(16, 32)
    assert mask.sum(0).tolist() == pytest.approx([4] * 32, abs=1)
    assert mask.sum(1).tolist() == pytest.approx([8] * 16, abs=2)
    alone = STRATEGIES["uniform"](x[512:], offsets([144]), Budget.ratio(0.25), columns=12, backend=backend)
    assert (alone.keep_index + 512).tolist() == kept.keep_index[128:].tolist()


def test_pooling_over_the_grid_joins_the_nearest_kept_patch(backend: str) -> None:
    x, cu = torch.randn(101, 3), offsets([101])
    x[50] = float("nan")
    cls = torch.arange(101) == 0
    kept = STRATEGIES["pool"](x, cu, Budget.count(13), columns=10, protected=cls, backend=backend)
    assert kept.keep_index[0] == 0 and kept.sizes()[0] == 1  # the CLS token stands alone
    place = torch.stack([torch.arange(100) // 10, torch.arange(100) % 10], 1).float()
    seats = kept.keep_index[1:].long() - 1
    for i in range(100):
        if i == 49 and 49 not in seats.tolist():
            assert kept.assignment[50] == -1  # not finite: averaged into nothing
            continue
        distance = (place[seats] - place[i]).norm(dim=1)
        assert distance[kept.assignment[i + 1] - 1] <= distance.min() + 0.3
    assert kept.reduce(x).isfinite().all() or kept.assignment[50] >= 0


def test_probe_and_received_scores_are_rows_and_columns_of_the_map() -> None:
    torch.manual_seed(0)
    cu, heads, dim = offsets([7, 0, 9]), 4, 8
    query, key = torch.randn(16, heads, dim), torch.randn(16, 2, dim)
    probe = probe_scores(query[[6, 6, 15]], key, cu)
    column = received_scores(query, key, cu)
    for begin, end in ((0, 7), (7, 16)):
        k = key[begin:end].repeat_interleave(2, 1)
        attention = torch.softmax(torch.einsum("qhd,khd->hqk", query[begin:end], k) * dim**-0.5, -1)
        torch.testing.assert_close(probe[begin:end], attention[:, -1].mean(0))
        torch.testing.assert_close(column[begin:end], attention.mean((0, 1)))


def test_video_and_text_scores() -> None:
    torch.manual_seed(0)
    frame = torch.randn(6, 8)
    video = torch.cat([frame, frame, frame * 2, torch.randn(6, 8)])
    change = frame_change(video, 6)
    assert (change[:6] == 2).all() and change[6:18].abs().max() < 1e-6 and change[18:].min() > 1e-3
    counts = frame_counts(video, offsets([6, 6, 6, 6]), 12)
    assert int(counts.sum()) == 12 and int(counts.argmax()) == 3
    relevance = text_relevance(torch.eye(4), torch.eye(4)[[2]], offsets([4]), offsets([1]))
    assert relevance.tolist() == [0, 0, 1, 0]


def test_greedy_strategies_refuse_dynamic_budgets() -> None:
    with pytest.raises(ValueError, match="budget must be static"):
        STRATEGIES["divprune"](torch.randn(4, 2), offsets([4]), Budget.threshold(0.1))
    with pytest.raises(ValueError, match="budget must be a count for visionzip"):
        STRATEGIES["visionzip"](torch.randn(4, 2), offsets([4]), Budget.ratio(0.1), attention=torch.rand(4))
    with pytest.raises(ValueError, match=r"features must have shape \(total, channels\)"):
        best_match(torch.zeros(3), *(torch.zeros(1, dtype=torch.int32),) * 4)
