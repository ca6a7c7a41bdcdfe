"""Triton kernels with wrong integers in the interpreter: every access lies inside the tensors of the launch."""

from __future__ import annotations

import os
import random
from collections import Counter

import pytest
import torch

pytest.importorskip("triton")
from benchmarks.soak.launches import OPS, WAYS, apart, one, wrong, wrong_launches

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs Triton's interpreter")
LEAST = {
    "attention": 150,
    "padded attention": 150,
    "gather and merge": 150,
    "topk": 1,
    "topk scores": 1,
    "quantile": 30,
}
"""Launches with wrong integers of each operation, at least; the rest are in ``make soak``."""
USUAL = 100


@pytest.mark.parametrize("op", OPS)
def test_wrong_integers_reach_no_foreign_memory(op: str) -> None:
    counts, seed = Counter[str](), 0
    while counts.total() < LEAST.get(op, USUAL):
        counts += one(seed, op)
        seed += 1
        assert seed < 200, f"hardly any launches: {counts}"


@pytest.mark.parametrize("way", WAYS)
def test_wrong_integers_are_wrong(way: str) -> None:
    x = torch.tensor([0, 3, 3, 9], dtype=torch.int32)
    for seed in range(20):
        y = wrong(x, way, random.Random(seed))
        assert y.dtype == x.dtype and y.shape == x.shape and not torch.equal(x, y)
    assert x.tolist() == [0, 3, 3, 9]


def test_a_copy_keeps_its_strides() -> None:
    x = torch.arange(24.0).view(4, 6)[:, ::2]
    y = apart(x)
    assert torch.equal(x, y) and x.stride() == y.stride() and x.data_ptr() != y.data_ptr()


def test_an_access_outside_is_found() -> None:
    """A kernel that believes its offsets, as every one here did once."""
    import triton
    import triton.language as tl

    @triton.jit
    def believing(p_x, p_at, p_out):  # type: ignore[no-untyped-def]
        tl.store(p_out, tl.load(p_x + tl.load(p_at)))

    x, at, out = torch.randn(8), torch.tensor([3], dtype=torch.int32), torch.zeros(1)
    counts = Counter[str]()
    with pytest.raises(AssertionError, match="believing, argument 1 of 3"), wrong_launches(random.Random(0), counts):
        believing[(1,)](x, at, out)
