"""The CUDA late-interaction kernel, executed under the SIMT runner, against float64."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import cases
import numpy as np
import pytest
import torch
from simt.build import Simt
from simt.launches import as_array, on_simt

from fastxattn.ops.contrastive import windows
from fastxattn.ops.late_interaction import kernels_cuda, late_interaction_loss, maxsim
from fastxattn.ops.late_interaction.operator import KINDS
from fastxattn.ops.late_interaction.reference import best_match
from fastxattn.runtime import cuda as runtime_cuda
from fastxattn.testing.budget import assert_within_budget
from tests.test_late_interaction import compare, interleave, sets
from tests.test_late_interaction import run as run_public


def offsets(lengths: tuple[int, ...]) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int32)


def expected(
    x: np.ndarray, y: np.ndarray, cu_x: np.ndarray, cu_y: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sums and places of the best matches of x's tokens, and how far the second best lies below each."""
    sums = np.zeros((len(cu_x) - 1, len(cu_y) - 1))
    best = np.full((len(x), len(cu_y) - 1), -1)
    for n in range(len(cu_x) - 1):
        for m in range(len(cu_y) - 1):
            s = x[cu_x[n] : cu_x[n + 1]].astype(np.float64) @ y[cu_y[m] : cu_y[m + 1]].astype(np.float64).T
            if s.shape[1]:
                sums[n, m] = s.max(1).sum()
                best[cu_x[n] : cu_x[n + 1], m] = s.argmax(1)
    return sums, best


def run(simt: Simt, dtype: str, a: np.ndarray, b: np.ndarray, cu_a: np.ndarray, cu_b: np.ndarray, **options: int):
    n, m = len(cu_a) - 1, len(cu_b) - 1
    found = {
        "sum_a": np.empty((n, m), np.float32),
        "best_a": np.full((len(a), m), -2, np.int32),
        "sum_b": np.empty((n, m), np.float32),
        "best_b": np.full((len(b), n), -2, np.int32),
    }
    counts = getattr(simt, f"maxsim_{dtype}")(a=a, b=b, cu_a=cu_a, cu_b=cu_b, **found, **options)
    return found, counts


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize(("d", "aligned"), [(72, 1), (5, 0)])
def test_both_directions(simt: Simt, dtype: str, d: int, aligned: int) -> None:
    rng = np.random.default_rng(0)
    cu_a, cu_b = offsets((3, 0, 70, 1)), offsets((65, 130, 0, 2))
    a, b = (cases.as_dtype(rng.standard_normal((n + 2, d)), dtype) for n in (cu_a[-1], cu_b[-1]))
    a[-1], b[-1] = cases.as_dtype(np.full(d, np.nan), dtype), cases.as_dtype(np.full(d, np.nan), dtype)  # nobody's
    b[40] = b[7]  # the first of equals is kept
    found, counts = run(simt, dtype, a, b, cu_a, cu_b, aligned=aligned, order=1)
    x, y = cases.from_bits(a, dtype), cases.from_bits(b, dtype)
    for side, (sums, best) in {"a": expected(x, y, cu_a, cu_b), "b": (None, None)}.items():
        if side == "b":
            sums, best = expected(y, x, cu_b, cu_a)
            sums = sums.T
        np.testing.assert_allclose(found[f"sum_{side}"], sums, rtol=2e-6, atol=1e-5)
        np.testing.assert_array_equal(found[f"best_{side}"][:-2], best[:-2])
        assert (found[f"best_{side}"][-2:] == -2).all()
    if aligned:
        for kind in ("ldmatrix", "cp_async", "load"):
            assert counts[kind][0] == counts[kind][1], f"bank conflicts in {kind}"


def test_long_sets_and_nan(simt: Simt) -> None:
    """Beyond the columns that are kept in shared memory; NaN reaches the pairs that see it."""
    rng = np.random.default_rng(1)
    cu_a, cu_b = offsets((4,)), offsets((1030, 3))
    a, b = (rng.standard_normal((n, 4)).astype(np.float32) for n in (cu_a[-1], cu_b[-1]))
    found, _ = run(simt, "float32", a, b, cu_a, cu_b)
    sums, best = expected(a, b, cu_a, cu_b)
    np.testing.assert_allclose(found["sum_a"], sums, rtol=1e-6)
    np.testing.assert_array_equal(found["best_a"], best)
    np.testing.assert_allclose(found["sum_b"], expected(b, a, cu_b, cu_a)[0].T, rtol=1e-6)
    b[1031] = np.nan
    found, _ = run(simt, "float32", a, b, cu_a, cu_b)
    assert np.isnan(found["sum_a"][0, 1]) and np.isnan(found["sum_b"][0, 1])
    np.testing.assert_allclose(found["sum_a"][0, 0], sums[0, 0], rtol=1e-6)


@contextmanager
def cuda_backend(simt: Simt, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """``maxsim`` takes ``backend="cuda"`` for CPU tensors; the launches go to the runner."""
    monkeypatch.setattr(runtime_cuda, "unavailable", lambda device: None)
    with on_simt(simt, monkeypatch, *(("", getattr(kernels_cuda, n + s)) for n in KINDS for s in ("", "_backward"))):
        yield


SMOOTH = (None, 0.2)


@pytest.mark.parametrize("smooth", SMOOTH)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("d", [40, 5])
def test_scores_and_gradients_keep_the_budget(
    simt: Simt, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, smooth: float | None, d: int
) -> None:
    """Both directions, host code and kernels together, NaN past the last offset; the yardstick is plain PyTorch."""
    lengths = [3, 0, 17, 70, 1, 33, 20, 64], [19, 66, 1, 0, 40, 5]
    arguments = interleave(sets(lengths[0], d, dtype), sets(lengths[1], d, dtype, 1))
    options = {"direction": "both", "smooth": smooth}
    with cuda_backend(simt, monkeypatch):
        sums, grads = run_both(*arguments, "cuda", **options)
    expected, eager = (run_both(*arguments, "reference", wide=wide, **options) for wide in (True, False))
    rough = eager[0] if dtype == torch.float32 else rounded_scores(*arguments, smooth)
    for name, found, exact, plain in zip("ab", sums, expected[0], rough, strict=True):
        assert_within_budget(f"score {name}", found, exact, plain)
        assert (found.double() - exact).norm() < 1e-6 * exact.norm()
    for name, found, exact, plain in zip("ab", grads, expected[1], eager[1], strict=True):
        assert (found[-2:] == 0).all(), "nobody's tokens got a gradient"
        if smooth is None or dtype != torch.float32:
            assert_within_budget(f"gradient {name}", found, exact, plain, backward=True)
        else:  # torch's product, which sums all sets in one chain; its other factor keeps the budget, see below
            assert (found.double() - exact).norm() < 1e-6 * exact.norm()


def rounded_scores(a: torch.Tensor, b: torch.Tensor, cu_a: torch.Tensor, cu_b: torch.Tensor, smooth: float | None):
    """What plain PyTorch gives whose similarities are of the tokens' dtype."""
    tables = []
    similarity = (a.float() @ b.float().T).to(a.dtype).float()
    for turned in (False, True):
        pairs = [similarity[i:j, k:m] for i, j in pairwise(cu_a.tolist()) for k, m in pairwise(cu_b.tolist())]
        best = [best_match(s.T if turned else s, smooth).sum() for s in pairs]
        tables.append(torch.stack(best).reshape(len(cu_a) - 1, len(cu_b) - 1))
    return tables


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_weights_of_smooth_maxima_keep_the_budget(simt: Simt, dtype: str) -> None:
    """A window inside the matrix, in any order of threads; the yardstick is torch's softmax in float32."""
    kind = getattr(torch, dtype)
    a, b, cu_a, cu_b = interleave(sets([30, 0, 50], 24, kind), sets([70, 9, 31], 24, kind, 1))
    smooth, first, rows, columns = 0.25, 64, len(a), len(b) - 64
    g = torch.Generator().manual_seed(0)
    grads = [torch.randn(3, 3, generator=g) for _ in "ab"]
    known = [torch.arange(len(x), dtype=torch.int32) for x in (a, b)]
    set_a, set_b = (
        torch.bucketize(t, cu[1:], right=True, out_int32=True) for t, cu in zip(known, (cu_a, cu_b), strict=True)
    )
    results, best = [], [np.zeros((len(a), 3), np.float32), np.zeros((3, len(b)), np.float32)]
    for wide in (torch.float64, torch.float32):
        weights = torch.zeros(len(a), len(b), dtype=wide)
        similarity = a.to(wide) @ b.to(wide).T
        for n, m in ((0, 0), (0, 1), (0, 2), (2, 0), (2, 1), (2, 2)):
            place = slice(cu_a[n], cu_a[n + 1]), slice(cu_b[m], cu_b[m + 1])
            s = similarity[place] if dtype == "float32" or wide == torch.float64 else similarity[place].to(kind).float()
            weights[place] = grads[0][n, m] * (s / smooth).softmax(1) + grads[1][n, m] * (s / smooth).softmax(0)
            if wide == torch.float64:
                best[0][place[0], m] = best_match(s, smooth).numpy()
                best[1][n, place[1]] = best_match(s.T, smooth).numpy()
        results.append(weights[:, first:])
    found = np.full((rows, columns + 3), -7.0, np.float32)
    counts = getattr(simt, f"smooth_weights_{dtype}")(
        weights=found,
        x=as_array(a),
        y=as_array(b),
        cu_x=cu_a.numpy(),
        cu_y=cu_b.numpy(),
        set_x=set_a.numpy(),
        set_y=set_b.numpy(),
        best_x=best[0],
        best_y=best[1],
        grad_x=grads[0].numpy(),
        grad_y=grads[1].numpy(),
        stride_x=3,
        stride_y=1,
        smooth=smooth,
        first_y=first,
        aligned=1,
        order=1,
    )
    assert_within_budget("weights", torch.from_numpy(found[:, :columns].copy()), *results, backward=True)
    assert (found[:, columns:] == -7).all(), "written beyond the window"
    for access in ("ldmatrix", "cp_async", "load"):
        assert counts[access][0] == counts[access][1], f"bank conflicts in {access}"


def run_both(a: torch.Tensor, b: torch.Tensor, cu_a: torch.Tensor, cu_b: torch.Tensor, backend: str, **options: Any):
    """Results and gradients in the dtype of ``a``, or ``wide`` in float64."""
    leaves = [t.double() if options.get("wide") else t.clone() for t in (a, b)]
    leaves = [t.requires_grad_() for t in leaves]
    options.pop("wide", None)
    sums = maxsim(*leaves, cu_a, cu_b, backend=backend, **options)
    weights = (torch.linspace(-1, 1, s.numel(), dtype=torch.float64).reshape(s.shape).to(s.dtype) for s in sums)
    return sums, torch.autograd.grad(sum((s * w).sum() for s, w in zip(sums, weights, strict=True)), leaves)


@pytest.mark.parametrize("smooth", SMOOTH)
@pytest.mark.parametrize("direction", ["a", "b"])
def test_one_direction_and_the_mean(
    simt: Simt, monkeypatch: pytest.MonkeyPatch, direction: str, smooth: float | None
) -> None:
    arguments = interleave(sets([5, 30, 2], 24), sets([9, 1, 40, 7], 24, seed=1))
    with cuda_backend(simt, monkeypatch):
        compare(*arguments, direction=direction, reduction="mean", smooth=smooth, backend="cuda")


@pytest.mark.parametrize("smooth", SMOOTH)
@pytest.mark.parametrize(
    ("lengths_a", "lengths_b"), [([1] * 20, [1] * 3), ([2], [1] * 70), ([0], [0]), ([], [3]), ([130], [1030])]
)
def test_sets_longer_and_shorter_than_a_block(
    simt: Simt, monkeypatch: pytest.MonkeyPatch, lengths_a: list[int], lengths_b: list[int], smooth: float | None
) -> None:
    """The last is longer than what is kept of columns in shared memory."""
    arguments = interleave(sets(lengths_a, 4), sets(lengths_b, 4, seed=1))
    with cuda_backend(simt, monkeypatch):
        compare(*arguments, direction="both", smooth=smooth, backend="cuda")


def test_smooth_windows(simt: Simt, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(windows, "WINDOW", 64)
    arguments = interleave(sets([70, 3, 2], 8), sets([9, 70, 40, 7], 8, seed=1))
    with cuda_backend(simt, monkeypatch):
        compare(*arguments, direction="both", smooth=0.3, backend="cuda")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize(("d", "aligned"), [(136, 1), (5, 0)])
def test_gradient_in_shares_and_any_order(simt: Simt, dtype: str, d: int, aligned: int) -> None:
    """The kernel alone: bits do not depend on the order of threads, and no bank serves twice at once."""
    a, b, cu_a, cu_b = interleave(sets([3, 0, 9, 70, 1], d), sets([33, 1, 0, 40], d, seed=1))
    x, y = (cases.as_dtype(t.numpy(), dtype) for t in (a, b))
    rng = np.random.default_rng(0)
    lengths_a, lengths_b = cu_a.diff().numpy(), cu_b.diff().numpy()
    set_a, set_b = (
        np.append(np.repeat(np.arange(len(n)), n), [len(n)] * 2).astype(np.int32) for n in (lengths_a, lengths_b)
    )
    own, met = np.full((len(x), 4), -1, np.int32), np.full((5, len(y)), -1, np.int32)
    for i in range(len(x) - 2):
        own[i] = np.where(lengths_b > 0, rng.integers(0, np.maximum(lengths_b, 1)), -1)
    for j in range(len(y) - 2):
        met[:, j] = np.where(lengths_a > 0, rng.integers(0, np.maximum(lengths_a, 1)), -1)
    grads = {k: rng.standard_normal((5, 4)).astype(np.float32) for k in ("grad_x", "grad_y")}
    grads["grad_x"][2, 1] = grads["grad_y"][2, 1] = 0.0
    y[33] = cases.as_dtype(np.full(d, np.nan), dtype)  # the only token of set 1: seen where its weight is not 0
    expected = np.zeros((len(x), d))
    wide = cases.from_bits(y, dtype).astype(np.float64)
    for i in range(len(x) - 2):
        for m in np.flatnonzero(lengths_b):
            if (g := grads["grad_x"][set_a[i], m]) != 0:
                expected[i] += g * wide[cu_b[m] + own[i, m]]
    for n in np.flatnonzero(lengths_a):
        for j in range(len(y) - 2):
            if (g := grads["grad_y"][n, set_b[j]]) != 0:
                expected[cu_a[n] + met[n, j]] += g * wide[j]
    found = []
    for shares, order in ((1, 0), (3, 1), (3, 2)):
        out = np.empty((shares, len(x), d), np.float32)
        counts = getattr(simt, f"maxsim_gradient_{dtype}")(
            out=out,
            x=x,
            y=y,
            cu_x=cu_a.numpy(),
            cu_y=cu_b.numpy(),
            set_x=set_a,
            set_y=set_b,
            best_x=own,
            best_y=met,
            **grads,
            stride_x=4,
            stride_y=1,
            aligned=aligned,
            order=order,
        )
        found.append(out)
        np.testing.assert_allclose(out.sum(0), expected, rtol=1e-5, atol=3e-6)
        assert np.isfinite(out[:, 3:12]).all(), "a NaN of weight 0 was seen"
        for kind in ("load", "store"):
            assert counts[kind][0] == counts[kind][1], f"bank conflicts in {kind}"
    np.testing.assert_array_equal(found[1], found[2])


def test_the_first_of_equal_matches_takes_the_gradient(simt: Simt, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = torch.ones(2, 4, requires_grad=True), torch.ones(6, 4, requires_grad=True)
    cu_a, cu_b = (torch.tensor([0, n], dtype=torch.int32) for n in (2, 6))
    with cuda_backend(simt, monkeypatch):
        maxsim(a, b, cu_a, cu_b, backend="cuda").sum().backward()
    assert b.grad is not None
    assert b.grad.sum(1).tolist() == [8.0, 0, 0, 0, 0, 0]


def test_nan_reaches_only_who_sees_it(simt: Simt, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b, cu_a, cu_b = interleave(sets([5, 30], 24), sets([9, 40], 24, seed=1))
    b[3] = float("nan")
    x = a.clone().requires_grad_()
    with cuda_backend(simt, monkeypatch):
        scores = maxsim(x, b, cu_a, cu_b, backend="cuda")
        assert scores[:, 0].isnan().all() and scores[:, 1].isfinite().all()
        scores[:, 1].sum().backward()
        smooth = maxsim(a, b, cu_a, cu_b, smooth=0.2, backend="cuda")
        assert smooth[:, 0].isnan().all() and smooth[:, 1].isfinite().all()
    assert x.grad is not None and x.grad.isfinite().all()


@pytest.mark.parametrize("smooth", SMOOTH)
def test_loss_and_its_gradient(simt: Simt, monkeypatch: pytest.MonkeyPatch, smooth: float | None) -> None:
    arguments = interleave(sets([5, 30, 8], 24), sets([9, 40, 3], 24, seed=1))
    options = {"logit_scale": torch.tensor(8.0), "smooth": smooth}
    (expected,), grads_expected = run_public(late_interaction_loss, *arguments, "reference", **options)
    with cuda_backend(simt, monkeypatch):
        (actual,), grads = run_public(late_interaction_loss, *arguments, "cuda", **options)
    torch.testing.assert_close(actual.double(), expected, atol=1e-6, rtol=1e-6)
    for g, e in zip(grads, grads_expected, strict=True):
        torch.testing.assert_close(g.double(), e, atol=1e-6, rtol=1e-4)
