"""The attention forward for compute capability 9.0, executed by the SIMT runner, keeps the attention contract."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from simt.attention import runs_on
from simt.build import Simt, SimtFault
from torch import Tensor

from fastxattn.ops.attention.problem import Problem
from fastxattn.testing import attention as contract

HALVES = (torch.float16, torch.bfloat16)
RAGGED_Q, RAGGED_K = (5, 0, 177, 1, 64, 33), (64, 33, 0, 300, 129, 128)
"""No query, no key, one tile, a full tile, a tail of one key, more than one tile of rows."""
CASES = {
    case.name: case
    for case in (
        contract.AttentionCase("ragged", RAGGED_Q, RAGGED_K, heads=2, kv_heads=2),
        contract.AttentionCase("many_tiles", (70,), (1300,), heads=1, kv_heads=1),  # the ring goes round several times
        contract.AttentionCase("tiny", (40, 130, 3, 17), (1, 2, 1, 127), heads=1, kv_heads=1),
        contract.AttentionCase("gqa", RAGGED_Q, RAGGED_K, heads=6, kv_heads=2),
        contract.AttentionCase("mqa", (33, 1), (200, 140), heads=5, kv_heads=1),
        contract.AttentionCase("dims_48_64", RAGGED_Q, RAGGED_K, heads=2, kv_heads=1, head_dim=48, value_dim=64),
        contract.AttentionCase("dims_80_40", RAGGED_Q, RAGGED_K, heads=2, kv_heads=1, head_dim=80, value_dim=40),
        contract.AttentionCase("dims_128", RAGGED_Q, RAGGED_K, heads=2, kv_heads=1, head_dim=128, value_dim=128),
        contract.AttentionCase("many_tiles_128", (70,), (900,), heads=1, kv_heads=1, head_dim=128, value_dim=128),
        contract.AttentionCase("softcap", RAGGED_Q, RAGGED_K, heads=2, kv_heads=2, softcap=2.0),
    )
}


def run(simt: Simt, order: int = 0, counts: list | None = None) -> contract.Run:
    """The kernel, and attention_fwd.cuh for the sequences that it leaves."""
    return runs_on(simt, order, counts, "attention_wgmma")


def run_on_hopper(simt: Simt) -> contract.Run:
    """What the library runs on such a device, for any problem."""

    def either(problem: Problem) -> tuple[Tensor, Tensor]:
        try:
            return run(simt)(problem)
        except SimtFault as fault:
            if "does not take this problem" not in str(fault):
                raise
            return runs_on(simt)(problem)

    return either


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_results_are_inside_the_error_budget(simt: Simt, name: str, dtype: torch.dtype) -> None:
    contract.check_budget(run(simt), CASES[name].problem(dtype), backward=False)


@pytest.mark.parametrize("scale", [-0.1, 0.0, 0.5])
def test_any_scale(simt: Simt, scale: float) -> None:
    contract.check_budget(run(simt), CASES["gqa"].problem(torch.bfloat16).replace(scale=scale), backward=False)


def test_large_scores_do_not_overflow(simt: Simt) -> None:
    problem = CASES["many_tiles"].problem(torch.bfloat16)
    contract.check_budget(run(simt), problem.replace(query=problem.query * 64), backward=False)


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("name", ["ragged", "many_tiles", "dims_128", "mqa"])
def test_results_do_not_depend_on_the_order_of_threads_and_copies(simt: Simt, name: str, order: int) -> None:
    problem = CASES[name].problem(torch.float16)
    first = contract.results(run(simt), problem, backward=False)
    for key, t in contract.results(run(simt, order), problem, backward=False).items():
        assert torch.equal(t, first[key]), key


@pytest.mark.parametrize("head_dim", [64, 128])
def test_results_do_not_depend_on_neighbours(simt: Simt, head_dim: int) -> None:
    case = contract.AttentionCase("", (77, 20, 64), (33, 300, 129), 4, 2, head_dim, head_dim)
    contract.check_neighbours(run(simt), case.problem(torch.bfloat16), backward=False)


def test_which_kernel_runs_a_sequence_does_not_depend_on_neighbours(simt: Simt) -> None:
    """Alone and beside others, those of few rows or with keys to be cut go to one kernel, the rest to the other."""
    contract.check_neighbours(run_on_hopper(simt), contract.NEIGHBOURS.problem(torch.float16), backward=False)
    counts: list = []
    contract.results(run(simt, counts=counts), contract.NEIGHBOURS.problem(torch.float16), backward=False)
    assert counts[0]["wgmma"] > 0 and counts[0]["mma"] > 0


def soiled(t: Tensor, rows: slice, junk: float) -> Tensor:
    t = t.clone()
    t[rows] = junk
    return t


@pytest.mark.parametrize(("name", "junk"), [("tiny", torch.nan), ("dims_128", torch.nan), ("ragged", torch.inf)])
def test_foreign_rows_reach_nothing(simt: Simt, name: str, junk: float) -> None:
    """All sequences but one are NaN or infinite, and so are the rows that belong to nobody."""
    problem = CASES[name].problem(torch.float16)
    clean = contract.results(run(simt), problem, backward=False)
    for b in range(0, len(CASES[name].lengths_q), 2):
        q, k = (slice(*map(int, cu[b : b + 2])) for cu in (problem.cu_seqlens_q, problem.cu_seqlens_k))
        mine = {"query": problem.query[q], "key": problem.key[k], "value": problem.value[k]}
        dirty = {n: soiled(getattr(problem, n), slice(None), junk) for n in mine}
        for n, rows in (("query", q), ("key", k), ("value", k)):
            dirty[n][rows] = mine[n]
        got = contract.results(run(simt), problem.replace(**dirty), backward=False)  # type: ignore[arg-type]
        assert torch.equal(got["out"][q], clean["out"][q])
        assert torch.equal(got["lse"][:, q], clean["lse"][:, q])
    contract.check_unseen(run(simt), problem, junk, backward=False)


def test_nan_stays_with_those_who_see_it(simt: Simt) -> None:
    case = contract.AttentionCase("", (40, 40), (140, 140), heads=2, kv_heads=1)
    problem = case.problem(torch.bfloat16)
    value, query = soiled(problem.value, slice(135, 136), torch.nan), soiled(problem.query, slice(50, 51), torch.nan)
    dirty = problem.replace(value=value, query=query)
    got = contract.results(run(simt), dirty, backward=False)
    oracle = contract.results(contract.run_reference, contract.in_float64(dirty), backward=False)
    for name, t in got.items():
        assert torch.equal(t.isnan(), oracle[name].isnan()), name


def test_rows_in_use_and_query_index(simt: Simt) -> None:
    """seqused on both sides, an index of queries, and offsets that start and end anywhere in the data."""
    problem = CASES["ragged"].problem(torch.float16)
    g = torch.Generator().manual_seed(3)
    index = torch.randperm(problem.query.shape[0], generator=g)[: int(problem.cu_seqlens_q[-1])].int()
    used_q, used_k = torch.tensor([5, 0, 170, 0, 20, 33]).int(), torch.tensor([60, 33, 0, 255, 0, 127]).int()
    limited = problem.replace(seqused_q=used_q, seqused_k=used_k, query_index=index)
    contract.check_budget(run(simt), limited, backward=False)
    contract.check_unseen(run(simt), limited, backward=False)


@pytest.mark.parametrize("name", ["gqa", "dims_128"])
def test_strided_rows(simt: Simt, name: str) -> None:
    """Slices of one wide array, as a fused projection gives them: the bits of contiguous copies."""
    problem = CASES[name].problem(torch.bfloat16)
    views = {}
    for n in ("query", "key", "value"):
        t = getattr(problem, n)
        views[n] = torch.cat([t, torch.full_like(t, torch.nan)], 1)[:, : t.shape[1]]
    expected = contract.results(run(simt), problem, backward=False)
    got = run(simt)(problem.replace(**views))
    assert torch.equal(got[0], expected["out"]) and torch.equal(got[1], expected["lse"])


def test_what_the_kernel_does_for_a_tile(simt: Simt) -> None:
    """No bank conflicts, one copy per panel of a tile, and the products that the shape needs."""
    counts: list = []
    case = contract.AttentionCase("", (128,), (512,), heads=1, kv_heads=1, head_dim=128, value_dim=128)
    contract.results(run(simt, counts=counts), case.problem(torch.float16), backward=False)
    (c,) = counts
    assert c["wgmma"] == 2 * 4 * (128 // 16 + 128 // 16) and c["tma"] == 2 * 4 * 2 and c["mma"] == 0
    assert c["cp_async"][0] == c["cp_async"][1] and c["store"] == c["load"] == (0, 0)


def refused() -> dict[str, Problem]:
    """Problems for the other kernel."""
    ragged = CASES["ragged"]
    plain = ragged.problem(torch.float16)
    crooked = {n: torch.nn.functional.pad(getattr(plain, n), (3, 2))[..., 3:-2] for n in ("query", "key", "value")}
    found = {
        "kv_range": dataclasses.replace(ragged, kv_range="random").problem(torch.float16),
        "key_bias": dataclasses.replace(ragged, key_bias="row").problem(torch.float16),
        "key_index": dataclasses.replace(ragged, key_index=True).problem(torch.float16),
        "wide": dataclasses.replace(ragged, head_dim=256).problem(torch.float16),
        "narrow": dataclasses.replace(ragged, head_dim=32, value_dim=32).problem(torch.float16),
        "unaligned": plain.replace(**crooked),
        "one_query": dataclasses.replace(ragged, lengths_q=(1,) * 6).problem(torch.float16),
        "expanded": plain.replace(key=plain.key[:, :1].expand(-1, 2, -1)),
    }
    return found


@pytest.mark.parametrize("name", refused())
def test_other_problems_are_left_to_the_other_kernel(simt: Simt, name: str) -> None:
    with pytest.raises(SimtFault, match="does not take this problem"):
        run(simt)(refused()[name])
