"""The CUDA pruning kernels, executed under the SIMT runner, against the reference."""

from __future__ import annotations

from typing import Any

import cases
import numpy as np
import pytest
import torch
from simt.build import Simt
from simt.launches import on_simt

from fastxattn.ops.pruning import kernels_cuda, reference
from fastxattn.ops.pruning.problem import PROBLEMS, Match, Merge, Select

LENGTHS = ((5, 0, 300, 1, 256), (0,), (), (700, 33))


def offsets(lengths: tuple[int, ...]) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int32)


def scores_of(kind: str, total: int, rng: np.random.Generator) -> np.ndarray:
    scores = rng.standard_normal(total).astype(np.float32)
    if kind == "ties":
        scores = np.round(scores)
        scores[::7] = -0.0
    if kind == "equal":
        scores[:] = 3.0
    if kind == "nan":
        scores[rng.random(total) < 0.4] = np.nan
        scores[::11], scores[::13] = np.inf, -np.inf
    return scores


def run_select(simt: Simt, scores: np.ndarray, cu: np.ndarray, counts: list[int], extra: int, **options: Any) -> None:
    """Compare with the reference: everything equal."""
    guard, x = options.pop("protected", None), options.pop("x", None)
    wide = (
        None if x is None else torch.from_numpy(np.ascontiguousarray(x).view(np.int16 if x.itemsize == 2 else x.dtype))
    )
    capacity = sum(min(max(c, 0), int(n)) for c, n in zip(counts, np.diff(cu), strict=True)) + extra
    problem = Select(
        scores=torch.from_numpy(scores[: cu[-1]]),
        cu_seqlens=torch.from_numpy(cu),
        counts=torch.tensor(counts, dtype=torch.int32),
        protected=None if guard is None else torch.from_numpy(guard[: cu[-1]].astype(bool)),
        x=None,
        capacity=capacity,
    )
    expected = reference.select(problem)
    keep_index, assignment = np.empty(capacity, np.int32), np.empty(len(scores), np.int32)
    gathered = None if x is None else np.empty((capacity, x.shape[1]), x.dtype)
    results = {"keep_index": keep_index, "assignment": assignment, "gathered": gathered}
    simt.select(scores=scores, cu=cu, cu_keep=expected[1].numpy(), protected=guard, x=x, **results, **options)
    np.testing.assert_array_equal(keep_index, expected[0].numpy())
    np.testing.assert_array_equal(assignment[: cu[-1]], expected[2].numpy())
    assert (assignment[cu[-1] :] == -1).all()
    if wide is not None:
        rows = torch.where(expected[0][:, None] >= 0, wide[expected[0].clamp_min(0).long()], 0)
        np.testing.assert_array_equal(gathered.view(rows.numpy().dtype), rows.numpy())


@pytest.mark.parametrize("kind", ["random", "ties", "equal", "nan"])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_select(simt: Simt, kind: str, lengths: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    cu = offsets(lengths)
    scores = scores_of(kind, int(cu[-1]) + 3, rng)
    for share in (0.0, 0.3, 1.0):
        counts = [round(share * n) for n in lengths]
        run_select(simt, scores, cu, counts, extra=2, order=1)
        guard = (rng.random(len(scores)) < 0.5).astype(np.uint8)  # more protected than kept, and fewer
        run_select(simt, scores, cu, counts, extra=0, protected=guard)


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize(("columns", "aligned"), [(24, 1), (7, 0)])
def test_select_and_gather_in_one_launch(simt: Simt, itemsize: int, columns: int, aligned: int) -> None:
    rng = np.random.default_rng(1)
    cu = offsets((300, 0, 40))
    x = rng.integers(0, 2**15, (340, columns)).astype(np.uint16 if itemsize == 2 else np.int32)
    for shares in (1, 3):
        run_select(
            simt, scores_of("ties", 340, rng), cu, [70, 5, 40], 4, x=x, shares=shares, aligned=aligned, order=shares
        )


def test_select_beyond_the_cached_keys(simt: Simt) -> None:
    rng = np.random.default_rng(2)
    run_select(simt, scores_of("ties", 9000, rng), offsets((9000,)), [4000], 0)


def inverse_norms(x: np.ndarray) -> np.ndarray:
    norm = np.sqrt((x.astype(np.float64) ** 2).sum(1))
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(np.isfinite(norm), np.where(norm > 0, 1 / norm, 0), np.nan).astype(np.float32)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize(("channels", "aligned"), [(64, 1), (40, 1), (13, 0)])
def test_match(simt: Simt, dtype: str, channels: int, aligned: int) -> None:
    rng = np.random.default_rng(3)
    x = rng.standard_normal((230, channels)).astype(np.float32)
    x[20], x[21], x[90] = np.nan, 0.0, x[88]  # unusable, zero, and a duplicate that must lose to the first
    stored = cases.as_dtype(x, dtype)
    values = cases.from_bits(stored, dtype)
    order = rng.permutation(230).astype(np.int32)
    a_index, b_index = order[:100].copy(), order[100:].copy()
    cu_a, cu_b = offsets((70, 0, 29, 1)), offsets((66, 3, 61, 0))
    best, similarity = np.empty(100, np.int32), np.empty(100, np.float32)
    rows = {"a_index": a_index, "cu_a": cu_a, "b_index": b_index, "cu_b": cu_b}
    tensors = {"x": stored, **rows, "best": best, "similarity": similarity, "inverse_norm": inverse_norms(values)}
    counts = getattr(simt, f"match_{dtype}")(**tensors, aligned=aligned, shares=2, order=1)
    problem = Match(x=torch.from_numpy(values), **{name: torch.from_numpy(t) for name, t in rows.items()})
    expected, exact = (t.numpy() for t in reference.match(problem))
    np.testing.assert_array_equal(best, expected)
    np.testing.assert_allclose(similarity, exact, atol=1e-6)
    if aligned:
        for kind in ("ldmatrix", "load", "cp_async"):
            assert counts[kind][0] == counts[kind][1], f"bank conflicts in {kind}"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_merge(simt: Simt, dtype: str) -> None:
    rng = np.random.default_rng(4)
    stored = cases.as_dtype(rng.standard_normal((40, 1030)), dtype)
    values = torch.from_numpy(cases.from_bits(stored, dtype))
    assignment = torch.from_numpy(rng.integers(-1, 9, 40).astype(np.int32))
    weight = rng.random(40).astype(np.float32)
    ordered = torch.sort(assignment, stable=True)
    first = torch.searchsorted(ordered.values, torch.arange(11, dtype=torch.int32)).numpy()
    for coefficient in (None, weight):
        out = np.empty((10, 1030), stored.dtype)
        getattr(simt, f"merge_{dtype}")(
            x=stored, members=ordered.indices.numpy(), first=first, coefficient=coefficient, out=out
        )
        weights = None if coefficient is None else torch.from_numpy(coefficient)
        expected = reference.merge(Merge(x=values.double(), assignment=assignment, coefficient=weights, rows=10))
        np.testing.assert_allclose(
            cases.from_bits(out, dtype), expected, rtol=2**-8 if dtype == "bfloat16" else 0, atol=1e-6
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_host_code_and_kernels_together(simt: Simt, monkeypatch: Any, dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(5)
    cu = torch.tensor([0, 30, 30, 77], dtype=torch.int32)
    x, scores = torch.randn(77, 24, generator=g).to(dtype), torch.randn(77, generator=g)
    guard = torch.rand(77, generator=g) < 0.1
    counts = torch.tensor([10, 2, 40], dtype=torch.int32)
    names = ("select", "merge", "match")
    functions = (("pruning_", PROBLEMS[name].positional(getattr(kernels_cuda, name))) for name in names)
    with on_simt(simt, monkeypatch, *functions):
        ops = torch.ops.fastxattn
        found = ops.pruning_select_cuda(scores, cu, counts, guard, x, 55)
        problem = Select(scores=scores, cu_seqlens=cu, counts=counts, protected=guard, x=x, capacity=55)
        for t, expected in zip(found, reference.select(problem), strict=True):
            assert torch.equal(t, expected)
        order = torch.randperm(77, generator=g).int()
        cu_a, cu_b = (torch.tensor(t, dtype=torch.int32) for t in ([0, 20, 40], [0, 30, 37]))
        pairs = Match(x=x, a_index=order[:40], cu_a=cu_a, b_index=order[40:], cu_b=cu_b)
        best, similarity = ops.pruning_match_cuda(*pairs.values())
        expected = reference.match(pairs)
        assert torch.equal(best, expected[0])
        torch.testing.assert_close(similarity, expected[1], rtol=0, atol=1e-6)
        assignment, weight = torch.randint(-1, 12, (77,), generator=g).int(), torch.rand(77, generator=g)
        sums = Merge(x=x, assignment=assignment, coefficient=weight, rows=12)
        torch.testing.assert_close(ops.pruning_merge_cuda(*sums.values()), reference.merge(sums))
