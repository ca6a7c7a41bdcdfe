"""The SIMT runner itself: sound kernels pass with the right results, and each planted fault is caught."""

from __future__ import annotations

import cases
import numpy as np
import pytest
from simt.build import Simt, SimtFault

ORDERS = (0, 1, 2)


@pytest.mark.parametrize("order", ORDERS)
def test_sound_kernels_pass(simt: Simt, order: int) -> None:
    for n in (0, 1, 100, 128):
        x, y = np.arange(1, n + 1, dtype=np.float32), np.empty(n, dtype=np.float32)
        simt.reverse(fault="sound", x=x, y=y, order=order)
        padded = np.concatenate([x, np.zeros(128 - n, np.float32)])
        np.testing.assert_array_equal(y, padded[::-1][:n])
    y = np.empty(64, dtype=np.float32)
    simt.neighbours(synced=True, y=y, order=order)
    np.testing.assert_array_equal(y, np.arange(64) ^ 3)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("no_barrier", "race: reads shared memory that thread|read of uninitialised shared memory"),
        ("one_too_far", r"thread 100: global memory store out of bounds: 4 bytes, nearest is y \(400 bytes\)"),
        ("tail_in_shared", "thread 127: shared memory store out of bounds: 4 bytes at 512 of 512"),
        ("unwritten", "thread 122: read of uninitialised shared memory at byte 20"),
        ("divergent", "divergent barrier"),
        ("left_early", "divergent barrier: .* 1 at 'left the kernel'"),
    ],
)
@pytest.mark.parametrize("order", ORDERS)
def test_planted_faults_are_caught(simt: Simt, fault: str, message: str, order: int) -> None:
    x, y = np.ones(100, dtype=np.float32), np.empty(100, dtype=np.float32)
    with pytest.raises(SimtFault, match=message):
        simt.reverse(fault=fault, x=x, y=y, order=order)
    simt.reverse(fault="sound", x=x, y=y, order=order)  # the runner is usable after a fault


@pytest.mark.parametrize("order", range(8))
def test_race_within_a_warp_is_caught(simt: Simt, order: int) -> None:
    with pytest.raises(SimtFault, match=r"race: (reads|writes) shared memory that thread"):
        simt.neighbours(synced=False, y=np.empty(64, dtype=np.float32), order=order)


def test_asynchronous_copies_arrive_when_waited_for(simt: Simt) -> None:
    for n in (256, 250, 130):  # a tail inside a copy of 16 bytes
        x, y = np.arange(n, dtype=np.float32), np.empty(256, dtype=np.float32)
        simt.copy(fault=0, x=x, y=y)
        np.testing.assert_array_equal(y, np.concatenate([x, np.zeros(256 - n, np.float32)]))
    with pytest.raises(SimtFault, match="still filling"):
        simt.copy(fault=1, x=np.ones(256, np.float32), y=np.empty(256, np.float32))
    with pytest.raises(SimtFault, match=r"race: reads shared memory|still filling"):
        simt.copy(fault=2, x=np.ones(256, np.float32), y=np.empty(256, np.float32))


def test_blocks_meet_only_in_atomics(simt: Simt) -> None:
    counter = np.zeros(1, dtype=np.int32)
    simt.count(atomic=True, y=counter)
    assert counter[0] == 96
    with pytest.raises(SimtFault, match="race between blocks"):
        simt.count(atomic=False, y=counter)


def test_warp_functions_want_the_whole_warp(simt: Simt) -> None:
    with pytest.raises(SimtFault, match="divergent warp"):
        simt.branch(y=np.empty(32, dtype=np.int32))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_matrix_fragments_lie_where_ptx_says(simt: Simt, dtype: str) -> None:
    rng = np.random.default_rng(0)
    a, b = (cases.as_dtype(rng.standard_normal((n, 48)), dtype) for n in (16, 8))
    c = np.empty((16, 8), dtype=np.float32)
    getattr(simt, f"mma_{dtype}")(a=a, b=b, c=c)
    expected = cases.from_bits(a, dtype).astype(np.float64) @ cases.from_bits(b, dtype).astype(np.float64).T
    np.testing.assert_allclose(c, expected, rtol=0, atol=6 * 2**-23 * np.abs(expected).max())


@pytest.mark.parametrize(("stride", "passes"), [(1, 1), (2, 2), (8, 8), (9, 1), (32, 32)])
def test_bank_conflicts_are_counted(simt: Simt, stride: int, passes: int) -> None:
    counts = simt.stride(y=np.empty(32, dtype=np.float32), stride=stride)
    assert counts["store"] == counts["load"] == (passes, 1)
