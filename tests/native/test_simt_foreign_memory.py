"""CUDA kernels under the SIMT runner with wrong integers: no access outside the buffers, no hang.

Every launch of the problems here is made again with copies of its buffers, one of which holds wrong integers in one of
the ways of ``benchmarks.soak.launches``. Results are not looked at.
"""

from __future__ import annotations

import os
import random
from collections import Counter
from typing import Any

import cases
import numpy as np
import pytest
import torch
from simt.attention import runs_on
from simt.build import Simt, SimtFault
from simt.launches import on_simt

from benchmarks.soak.launches import WAYS, apart, wrong
from fastxattn.ops.late_interaction import kernels_cuda as late_interaction
from fastxattn.ops.late_interaction import maxsim
from fastxattn.ops.late_interaction.operator import KINDS
from fastxattn.ops.pruning import kernels_cuda as pruning
from fastxattn.ops.pruning.problem import PROBLEMS, Match, Merge, Select
from fastxattn.runtime import cuda as runtime_cuda
from fastxattn.testing import attention as contract
from fastxattn.testing import offsets
from tests.test_late_interaction import interleave, sets

SEEDS = 2


class Wrong:
    """A runner that makes each launch with wrong integers first, in every way, and counts them by kernel."""

    def __init__(self, simt: Simt, seed: int) -> None:
        self.simt, self.r, self.counts = simt, random.Random(seed), Counter[str]()

    def __getattr__(self, name: str) -> Any:
        function = getattr(self.simt, name)

        def call(**given: Any) -> Any:
            tensors = {key: torch.from_numpy(x) for key, x in given.items() if isinstance(x, np.ndarray)}
            for key, x in tensors.items():
                if x.dtype not in (torch.int32, torch.int64) or not x.numel():
                    continue
                for way in WAYS:
                    copies = {k: apart(wrong(t, way, self.r) if k == key else t).numpy() for k, t in tensors.items()}
                    os.environ["FXA_SIMT_BOUNDS_ONLY"] = "1"
                    try:
                        function(**{**given, **copies})
                    except SimtFault as fault:
                        raise AssertionError(f"{name}, {key}, {way}: {fault}") from fault
                    finally:
                        del os.environ["FXA_SIMT_BOUNDS_ONLY"]
                    self.counts[name] += 1
            return function(**given)

        return call


LENGTHS = {"lengths_q": (3, 0, 21, 1), "lengths_k": (40, 7, 0, 70), "head_dim": 32, "value_dim": 32}
HEADS = {"heads": 4, "kv_heads": 2}
ATTENTION = [
    contract.AttentionCase("plain", **LENGTHS, **HEADS),
    contract.AttentionCase("range and bias", **LENGTHS, **HEADS, kv_range="random", key_bias="head"),
    contract.AttentionCase("index", **LENGTHS, **HEADS, key_index=True, key_bias="row"),
    contract.AttentionCase("padded", **LENGTHS, **HEADS, padded=True, softcap=3.0),
    contract.AttentionCase("cut keys", (2, 1), (1200, 700), heads=1, kv_heads=1, head_dim=32, value_dim=32),
]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("case", ATTENTION, ids=str)
def test_attention(simt: Simt, case: contract.AttentionCase, dtype: torch.dtype) -> None:
    for seed in range(SEEDS):
        runner = Wrong(simt, seed)
        contract.results(runs_on(runner), case.problem(dtype, seed=seed))  # type: ignore[arg-type]
        assert len(runner.counts) == 2 and min(runner.counts.values()) >= 2 * len(WAYS), runner.counts


def test_attention_on_hopper(simt: Simt) -> None:
    case = contract.AttentionCase("long", (40, 0, 90), (130, 5, 9), heads=1, kv_heads=1, head_dim=64, value_dim=64)
    runner = Wrong(simt, 0)
    contract.results(runs_on(runner, kernel="attention_wgmma"), case.problem(torch.float16))  # type: ignore[arg-type]
    assert runner.counts["attention_wgmma_float16"] == 2 * len(WAYS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_pruning(simt: Simt, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    names, runner = ("select", "merge", "match"), Wrong(simt, 0)
    functions = (("pruning_", PROBLEMS[name].positional(getattr(pruning, name))) for name in names)
    with on_simt(runner, monkeypatch, *functions):  # type: ignore[arg-type]
        for seed in range(SEEDS):
            g = torch.Generator().manual_seed(seed)
            cu, x = offsets((30, 0, 47)), torch.randn(80, 24, generator=g).to(dtype)
            guard = None if seed else torch.rand(80, generator=g) < 0.1
            counts = torch.tensor([10, 2, 40], dtype=torch.int32)
            scores = torch.randn(80, generator=g)
            torch.ops.fastxattn.pruning_select_cuda(
                *Select(scores=scores, cu_seqlens=cu, counts=counts, protected=guard, x=x, capacity=55).values()
            )
            order = torch.randperm(80, generator=g).int()
            pairs = Match(x=x, a_index=order[:40], cu_a=offsets((20, 20)), b_index=order[40:], cu_b=offsets((30, 7)))
            torch.ops.fastxattn.pruning_match_cuda(*pairs.values())
            assignment = torch.randint(-1, 12, (80,), generator=g).int()
            sums = Merge(x=x, assignment=assignment, coefficient=torch.rand(80, generator=g), rows=12)
            torch.ops.fastxattn.pruning_merge_cuda(*sums.values())
    assert len(runner.counts) == 3


@pytest.mark.parametrize("smooth", [None, 0.2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_late_interaction(
    simt: Simt, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, smooth: float | None
) -> None:
    runner = Wrong(simt, 0)
    monkeypatch.setattr(runtime_cuda, "unavailable", lambda device: None)
    functions = [("", getattr(late_interaction, n + s)) for n in KINDS for s in ("", "_backward")]
    a, b, cu_a, cu_b = interleave(sets([3, 0, 17, 70], 40, dtype), sets([19, 66, 1, 0], 40, dtype, 1))
    with on_simt(runner, monkeypatch, *functions):  # type: ignore[arg-type]
        leaves = [t.clone().requires_grad_() for t in (a, b)]
        sums = maxsim(*leaves, cu_a, cu_b, direction="both", smooth=smooth, backend="cuda")
        torch.autograd.grad(sum(s.sum() for s in sums), leaves)
    assert len(runner.counts) == 2


def test_sets_longer_than_the_shared_columns(simt: Simt) -> None:
    """Offsets whose difference overflows must not pass for a short set."""
    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal((n, 4)).astype(np.float32) for n in (2, 1100))
    found = {"sum_a": np.empty((1, 1), np.float32), "best_a": np.empty((2, 1), np.int32)}
    found |= {"sum_b": np.empty((1, 1), np.float32), "best_b": np.empty((1100, 1), np.int32)}
    start = np.array([-(2**31), 1100], np.int32)
    simt.maxsim_float32(a=a, b=b, cu_a=np.array([0, 2], np.int32), cu_b=start, **found)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_positives(simt: Simt, dtype: str) -> None:
    rng, runner = np.random.default_rng(0), Wrong(simt, 0)
    x, y = (cases.as_dtype(rng.standard_normal((n, 24)), dtype) for n in (70, 90))
    getattr(runner, f"contrastive_positives_{dtype}")(
        logits=np.empty(70, np.float32),
        x=x,
        y=y,
        scale=np.ones(1, np.float32),
        aligned=1,
        norm_x=np.ones(70, np.float32),
        norm_y=np.ones(90, np.float32),
        target=np.arange(70, dtype=np.int32),
    )
    assert runner.counts.total() == len(WAYS)
