"""The Triton kernels against the attention contract: on the device where there is one, else in Triton's interpreter."""

import dataclasses
import functools
import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before the first import of triton
pytest.importorskip("triton")

from fastxattn.ops.attention import backends
from fastxattn.ops.attention.triton import launch, tiles
from fastxattn.ops.attention.triton.tiles import Tile
from fastxattn.runtime.backend import resolve
from fastxattn.testing import attention as contract
from fastxattn.testing.attention import ATTENTION_CASES
from fastxattn.testing.bounds import checked_accesses

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SEEDS = range(4 if DEVICE == "cuda" else 1)  # the interpreter can afford one
BY_NAME = {case.name: case for case in ATTENTION_CASES}
run = functools.partial(backends.run_on, "triton")


def short(case):
    """The case as the interpreter, which runs a program at a time, can afford it: the same features, fewer tiles."""
    if DEVICE == "cuda":
        return case
    lengths_q, lengths_k = (tuple(min(n, 70) for n in lengths[:4]) for lengths in (case.lengths_q, case.lengths_k))
    if case.bias is not None or case.dropout_p:  # the pass over the bias and the generator are the slowest of all
        lengths_q, lengths_k = (3, 0, 13), (9, 5, 35)
    elif case.lengths_q == BY_NAME["ragged"].lengths_q:
        lengths_q, lengths_k = (5, 0, 9, 1, 37), (40, 9, 0, 33, 50)
    kv_heads = 1 if case.name == "gqa" else min(case.kv_heads, 2)
    heads = kv_heads * (case.heads // case.kv_heads)
    return dataclasses.replace(case, lengths_q=lengths_q, lengths_k=lengths_k, kv_heads=kv_heads, heads=heads)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Several tiles each way even for short sequences, and no access outside a tensor."""
    if DEVICE == "cuda":
        yield
        return
    monkeypatch.setattr(launch.Launch, "tile", lambda self, kernel: Tile(32, 32, 4, 1))
    with checked_accesses():
        yield


@pytest.fixture
def split(monkeypatch):
    """The split-KV schedule for every problem."""
    monkeypatch.setattr(tiles, "SPLIT_QUERIES", 10**6)
    monkeypatch.setattr(tiles, "SPLIT_LENGTH", 0)
    monkeypatch.setattr(tiles, "SPLIT_KEYS", 32)
    monkeypatch.setattr(tiles, "MAX_SPLITS", 2)


# Known, from an H200: docs/design/gpu.md. In the interpreter, whose exponential is exact, it is inside its budget.
MISSES_ON_A_GPU = {"decode": "errors of out 1.09 (largest) and 1.01 (mean) times their budgets in one of four problems"}


def known_miss(name, dtype):
    if DEVICE == "cuda" and dtype == torch.float32 and name in MISSES_ON_A_GPU:
        pytest.xfail(MISSES_ON_A_GPU[name])


@pytest.mark.parametrize("case", [c for c in ATTENTION_CASES if c.name != "split_keys"], ids=str)
def test_budget_float32(case):
    known_miss(case.name, torch.float32)
    contract.check_budget_of_several(run, [short(case).problem(torch.float32, DEVICE, seed) for seed in SEEDS])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["dense", "gqa", "range", "key_index", "dropout", "everything"])
def test_budget_half(name, dtype):
    contract.check_budget(run, short(BY_NAME[name]).problem(dtype, DEVICE))


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(n, torch.float32) for n in ("decode", "mqa_decode", "range_gqa", "everything")]
    + [("everything", torch.bfloat16)],
    ids=str,
)
def test_budget_with_split_keys(split, name, dtype):
    known_miss(name, dtype)
    contract.check_budget_of_several(run, [short(BY_NAME[name]).problem(dtype, DEVICE, seed) for seed in SEEDS])


@pytest.mark.parametrize("name", ["ragged", "range", "key_index", "everything"])
def test_unseen_rows_may_hold_nan(name):
    contract.check_unseen(run, short(BY_NAME[name]).problem(torch.float32, DEVICE))


@pytest.mark.parametrize(
    ("where", "junk"), [("query", torch.nan), ("key", torch.nan), ("value", torch.nan), ("value", torch.inf)]
)
def test_junk_in_a_valid_row_stays_in_rows_that_see_it(where, junk):
    problem = short(BY_NAME["range"]).problem(torch.float32)
    t = getattr(problem, where).clone()
    t[20 if where == "query" else 100, 1, 2] = junk  # both in the last sequence
    problem = problem.replace(**{where: t})
    tensors = {name: t for name in problem.tensors if (t := getattr(problem, name)) is not None}
    found = contract.results(run, problem.replace(**{name: t.to(DEVICE) for name, t in tensors.items()}))
    wanted = contract.results(contract.run_reference, contract.in_float64(problem))
    for name, value in found.items():
        assert torch.equal(value.isfinite().cpu(), wanted[name].isfinite()), name


def test_repeatable_and_blind_to_neighbours():
    problem = short(BY_NAME["ragged"]).problem(torch.float32, DEVICE)
    contract.check_repeatable(run, problem)
    contract.check_neighbours(run, problem)


def test_split_keys_are_blind_to_neighbours(split):
    contract.check_neighbours(run, short(BY_NAME["mqa_decode"]).problem(torch.float32, DEVICE))


def test_one_schedule_for_every_batch_when_determinism_is_asked_for(monkeypatch):
    """Averages that say to cut the keys of the first sequence alone, and not beside the second."""
    monkeypatch.setattr(tiles, "SPLIT_QUERIES", 4)
    monkeypatch.setattr(tiles, "SPLIT_LENGTH", 64)
    monkeypatch.setattr(tiles, "SPLIT_KEYS", 32)
    case = contract.AttentionCase("", (2, 20), (70, 65), heads=1, kv_heads=1, head_dim=16, value_dim=16)
    problem = case.problem(torch.float32, DEVICE)
    assert tiles.splits_for(2, 70, 1, 1) > 1 == tiles.splits_for(22, 135, 2, 1)
    torch.use_deterministic_algorithms(True)
    try:
        contract.check_neighbours(run, problem)
    finally:
        torch.use_deterministic_algorithms(False)


def test_many_sequences():
    """Tile numbers beyond any 16-bit grid: most sequences here are empty."""
    lengths = torch.zeros(70_000, dtype=torch.int32)
    lengths[[0, 35_000, 69_999]] = torch.tensor([3, 40, 5], dtype=torch.int32)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int32), lengths.cumsum(0).int()]).to(DEVICE)
    assert launch.count_tiles(48, 70_000, 1, 32) == 70_001
    few = offsets[[0, 1, 35_001, 70_000]]  # the same tokens without the empty sequences
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(48, 1, 16, generator=g).to(DEVICE) for _ in range(3))
    tokens = {"query": q, "key": k, "value": v}
    problem = contract.Problem(**tokens, cu_seqlens_q=few, cu_seqlens_k=few, scale=0.25)
    wanted, _ = run(problem)
    starts = offsets[:-1].long() // 32 + torch.arange(70_000, device=DEVICE)
    assert bool((starts.diff() > 0).all()), "tile numbers of two sequences overlap"
    if DEVICE == "cuda":  # 70 001 programs: hours in the interpreter
        found, _ = run(problem.replace(cu_seqlens_q=offsets, cu_seqlens_k=offsets))
        assert torch.equal(found, wanted)


@pytest.mark.skipif(DEVICE == "cuda", reason="compute-sanitizer does this on a device")
def test_accesses_outside_a_tensor_are_found():
    """What holds masks and tails to account in every test of this file."""
    import triton
    import triton.language as tl

    @triton.jit
    def copy(p_x, p_y, n, BLOCK: tl.constexpr):
        o = tl.arange(0, BLOCK)
        tl.store(p_y + o, tl.load(p_x + o, mask=o < n, other=0.0), mask=o < n)

    x, y = torch.zeros(10), torch.zeros(9)
    with checked_accesses() as checked:
        copy[(1,)](x, y, 9, 16)
        assert checked == [18]
        with pytest.raises(Exception, match=r"a store of 4 bytes at .* is in no tensor given"):
            copy[(1,)](x, y, 10, 16)


def test_refusals():
    problem = BY_NAME["dense"].problem(torch.float64, DEVICE)
    with pytest.raises(RuntimeError, match="float64"):
        resolve("attention", backends.BACKENDS, problem, "triton")


def test_schedule_depends_on_shapes_alone():
    assert tiles.splits_for(32 * 8, 4096 * 8, 8, 1) == 32  # Q-Former
    assert tiles.splits_for(1024, 1024, 1, 1) == 1
    assert tiles.splits_for(32 * 8, 256 * 8, 8, 1) == 1
    assert tiles.splits_for(16, 16 * 2048, 16, 4) == 32  # decode, grouped heads
