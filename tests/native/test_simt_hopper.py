"""mbarriers, TMA copies and wgmma under the SIMT runner: sound kernels give NumPy's results, faults are caught."""

from __future__ import annotations

import cases
import numpy as np
import pytest
from simt.build import Simt, SimtFault

ORDERS = (0, 1, 2, 3)


def rows_problem(dtype: str, depth: int = 160) -> dict[str, np.ndarray]:
    """A (50, 1, depth) and B (64, 1, depth) for C = A B^T: rows and columns past the last are read as zeros."""
    rng = np.random.default_rng(0)
    a, b = (cases.as_dtype(rng.standard_normal((n, 1, depth)), dtype) for n in (50, 64))
    return {"a": a, "b": b, "c": np.empty((64, 64), dtype=np.float32)}


def depth_problem(dtype: str, rows: int = 40) -> dict[str, np.ndarray]:
    """A (64, 32) and B (rows, 3 heads, 128), of which head 1 is multiplied."""
    rng = np.random.default_rng(1)
    a, b = (cases.as_dtype(rng.standard_normal(shape), dtype) for shape in ((64, 32), (rows, 3, 128)))
    return {"a": a, "b": b, "c": np.empty((64, 128), dtype=np.float32)}


def check(c: np.ndarray, expected: np.ndarray, products: int) -> None:
    """Sums are cut off after every eight products."""
    np.testing.assert_allclose(c, expected, rtol=0, atol=products / 8 * 2**-23 * 4 * np.abs(expected).max())


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_products_of_rows(simt: Simt, dtype: str, order: int) -> None:
    given = rows_problem(dtype)
    counts = getattr(simt, f"wgmma_rows_{dtype}")(fault="sound", order=order, **given)
    a, b = (cases.from_bits(given[n], dtype).astype(np.float64)[:, 0] for n in "ab")
    check(given["c"], np.pad(a @ b.T, ((0, 14), (0, 0))), 160)
    assert counts["wgmma"] == 12 and counts["tma"] == 6


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize(("first", "left"), [(0, 32), (3, 20), (30, 32)])
def test_products_along_the_depth(simt: Simt, dtype: str, order: int, first: int, left: int) -> None:
    given = depth_problem(dtype)
    given["b"][first + left :] = cases.as_dtype(np.full(128, np.nan), dtype)  # the next sequence's
    getattr(simt, f"wgmma_depth_{dtype}")(fault="sound", order=order, first=first, left=left, **given)
    a, b = (cases.from_bits(given[n], dtype).astype(np.float64) for n in "ab")
    rows = b[first : first + left, 1]
    check(given["c"], a[:, : len(rows)] @ rows, 32)


FILLING = "that a TMA copy is still filling|that a TMA copy wrote|uninitialised shared memory"
READING = "may still be reading|overwrites what a wgmma read, with no synchronisation since its wait"
FAULTS = {
    "no_full_wait": f"wgmma reads .*({FILLING})",
    "one_thread_waits": "race: wgmma reads shared memory that a TMA copy wrote",
    "no_empty_wait": f"more arrivals than the mbarrier|{FILLING}|{READING}",
    "early_release": READING,
    "overwritten": "overwrites shared memory that a wgmma may still be reading",
    "expects_nothing": f"wgmma reads .*({FILLING})",
    "expects_too_much": "deadlock: an mbarrier never completes: .* lacks 0 arrivals and 16 bytes in phase 0",
    "unfenced_barriers": "initialised without fence_barriers",
    "unordered_barriers": "there is no mbarrier|initialisation by thread 0 is not synchronised",
    "extra_arrival": f"more arrivals than the mbarrier|{FILLING}",
    "no_commit": f"use of registers that a wgmma still works on|{READING}",
    "no_wgmma_wait": f"use of registers that a wgmma still works on|{READING}",
    "no_wgmma_fence": "wgmma on registers that were used since the last wgmma_fence",
    "absent_warp": "deadlock: .* 96 at 'wgmma_rows'",
    "copy_left": "it ended (while a TMA copy was in flight to byte 17408|in the middle of a phase)",
    "barrier_loaded": "load of an mbarrier",
    "greedy": "registers_grow waits for ever: the warp groups want 75776 of 65536",
}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_caught(simt: Simt, fault: str, order: int) -> None:
    with pytest.raises(SimtFault, match=FAULTS[fault]):
        simt.wgmma_rows_float16(fault=fault, order=order, **rows_problem("float16"))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("no_fence_async", "wgmma reads shared memory that thread .* wrote without fence_async"),
        ("no_barrier", "race: wgmma reads shared memory that thread"),
        ("touched_operand", "use of registers that a wgmma still works on"),
        ("unfenced_operand", "wgmma on registers that were used since the last wgmma_fence"),
    ],
)
def test_planted_faults_in_cleared_tiles_are_caught(simt: Simt, fault: str, message: str, order: int) -> None:
    with pytest.raises(SimtFault, match=message):
        simt.wgmma_depth_float16(fault=fault, order=order, first=3, left=20, **depth_problem("float16"))
