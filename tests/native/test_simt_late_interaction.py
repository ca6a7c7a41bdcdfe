"""The CUDA late-interaction kernel, executed under the SIMT runner, against float64."""

from __future__ import annotations

import cases
import numpy as np
import pytest
import torch
from simt.build import Simt
from simt.launches import on_simt

from fastxattn.ops.late_interaction import cuda
from fastxattn.ops.late_interaction.reference import maxsim_reference


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
        "sum_a": np.empty((n, m), np.float32), "best_a": np.full((len(a), m), -2, np.int32),
        "sum_b": np.empty((n, m), np.float32), "best_b": np.full((len(b), n), -2, np.int32),
    }  # fmt: skip
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


@pytest.mark.parametrize(("from_a", "from_b"), [(True, True), (True, False), (False, True)])
def test_host_code_and_kernel_together(simt: Simt, monkeypatch, from_a: bool, from_b: bool) -> None:
    g = torch.Generator().manual_seed(2)
    a, b = torch.randn(20, 16, generator=g), torch.randn(33, 16, generator=g)
    cu_a, cu_b = torch.from_numpy(offsets((4, 0, 15))), torch.from_numpy(offsets((30, 2)))
    with on_simt(simt, monkeypatch, ("", cuda.maxsim)):
        found = torch.ops.fastxattn.maxsim_cuda(a, b, cu_a, cu_b, from_a, from_b)
    for t, expected in zip(found, maxsim_reference(a, b, cu_a, cu_b, from_a, from_b, None), strict=False):
        torch.testing.assert_close(t, expected)
