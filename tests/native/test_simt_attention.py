"""The CUDA attention kernels, executed by the SIMT runner, keep the attention contract."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from simt.attention import runs_on
from simt.build import Simt

from fastxattn.ops.attention import kernels_cuda
from fastxattn.testing import attention as contract

CASES = {case.name: case for case in contract.ATTENTION_CASES if case.bias is None and not case.dropout_p}
HALVES = (torch.float16, torch.bfloat16)
DTYPES = (*HALVES, torch.float32)
WIDE = ("dims_129_200", "dims_256_256")  # beyond what float32 is compiled for
FEW = (
    "ragged",
    "gqa",
    "dims_3_17",
    "dims_256_256",
    "softcap",
    "range_gqa",
    "key_bias_heads",
    "key_index",
    "split_keys",
)
BUDGETS = [
    *((name, torch.float16) for name in CASES),
    *((name, torch.bfloat16) for name in FEW),  # the same kernels in another format
    *((name, torch.float32) for name in CASES if name not in WIDE),
]


@pytest.mark.parametrize(("name", "dtype"), BUDGETS, ids=str)
def test_results_are_inside_the_error_budget(simt: Simt, name: str, dtype: torch.dtype) -> None:
    contract.check_budget(runs_on(simt), CASES[name].problem(dtype))


@pytest.mark.parametrize("name", ["range_gqa", "key_index", "padded"])
@pytest.mark.parametrize(
    ("dtype", "junk"), [(torch.float16, torch.nan), (torch.float16, torch.inf), (torch.float32, torch.nan)], ids=str
)
def test_what_nobody_sees_reaches_nothing(simt: Simt, name: str, junk: float, dtype: torch.dtype) -> None:
    contract.check_unseen(runs_on(simt), CASES[name].problem(dtype), junk)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_nan_stays_with_those_who_see_it(simt: Simt, dtype: torch.dtype) -> None:
    """NaN in a value and in a query reaches exactly the results that the reference finds it in."""
    case = dataclasses.replace(CASES["causal"], lengths_q=(70,), lengths_k=(70,), heads=2, kv_heads=1)
    problem = case.problem(dtype)
    value, query = problem.value.clone(), problem.query.clone()
    value[40, 0, 5] = torch.nan
    query[20, 1] = torch.nan
    soiled = problem.replace(value=value, query=query)
    found = contract.results(runs_on(simt), soiled)
    oracle = contract.results(contract.run_reference, contract.in_float64(soiled))
    clean = contract.results(runs_on(simt), problem)
    for name, t in found.items():
        assert torch.equal(t.isnan(), oracle[name].isnan()), name
    assert found["out"][40:70, :, 5].isnan().all() and found["out"][21:40].isfinite().all()
    assert torch.equal(found["out"][:20], clean["out"][:20])


@pytest.mark.parametrize("name", ["ragged", "range_gqa", "dims_3_17", "causal"])
def test_results_do_not_depend_on_neighbours(simt: Simt, name: str) -> None:
    contract.check_neighbours(runs_on(simt), CASES[name].problem(torch.bfloat16))


@pytest.mark.parametrize(
    ("options", "dtype"),
    [({}, torch.bfloat16), ({}, torch.float32), ({"kv_range": "random", "key_bias": "head"}, torch.float16)],
    ids=str,
)
def test_the_schedule_of_a_sequence_is_its_own(simt: Simt, options: dict[str, str], dtype: torch.dtype) -> None:
    """Whether keys are cut, beside sequences that want another choice."""
    case = dataclasses.replace(contract.NEIGHBOURS, head_dim=32, value_dim=32, **options)
    contract.check_neighbours(runs_on(simt), case.problem(dtype), backward=False)


@pytest.mark.parametrize("name", ["range_gqa", "key_index", "split_keys"])
def test_results_do_not_depend_on_the_order_of_threads(simt: Simt, name: str) -> None:
    problem = CASES[name].problem(torch.float16)
    first = contract.results(runs_on(simt), problem)
    for order in (1, 2):
        for key, t in contract.results(runs_on(simt, order), problem).items():
            assert torch.equal(t, first[key]), f"{key} depends on which thread runs first"


@pytest.mark.parametrize(
    ("dtype", "scale"), [(torch.float16, -0.1), (torch.bfloat16, 0.0), (torch.float32, 0.0)], ids=str
)
def test_any_scale(simt: Simt, dtype: torch.dtype, scale: float) -> None:
    contract.check_budget(runs_on(simt), CASES["gqa"].problem(dtype).replace(scale=scale))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_keys_are_cut_where_queries_are_few(simt: Simt, dtype: torch.dtype) -> None:
    ragged = dataclasses.replace(CASES["split_keys"], lengths_q=(1, 3, 0), lengths_k=(3300, 700, 40), kv_range="random")
    contract.check_budget(runs_on(simt), ragged.problem(dtype), backward=False)


def test_which_keys_are_cut(simt: Simt, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without memory for chunks no keys are cut: the rows whose bits change are those of few rows and many keys."""
    problem = dataclasses.replace(contract.NEIGHBOURS, head_dim=32, value_dim=32).problem(torch.float32)
    cut = contract.results(runs_on(simt), problem, backward=False)
    monkeypatch.setattr(kernels_cuda, "CUT_LENGTH", 10**6)
    assert kernels_cuda.Plan.of(problem).parts() == (None, None)
    whole = contract.results(runs_on(simt), problem, backward=False)
    changed = (cut["lse"] != whole["lse"]).any(0) | (cut["out"] != whole["out"]).flatten(1).any(1)
    offsets = problem.cu_seqlens_q.tolist()
    found = [bool(changed[a:b].any()) for a, b in zip(offsets, offsets[1:], strict=False)]
    assert found == [True, False, False, False, False, True]


def test_unaligned_rows_are_read_piecewise(simt: Simt) -> None:
    """Views whose rows start anywhere give the bits that aligned copies give."""
    problem = CASES["gqa"].problem(torch.float16)
    wide = {
        name: torch.nn.functional.pad(getattr(problem, name), (3, 2))[..., 3:-2] for name in ("query", "key", "value")
    }
    crooked = problem.replace(**wide)
    assert kernels_cuda.Plan.of(problem).aligned and not kernels_cuda.Plan.of(crooked).aligned
    expected = contract.results(runs_on(simt), problem)
    for name, t in contract.results(runs_on(simt), crooked).items():
        assert torch.equal(t, expected[name]), name


@pytest.mark.parametrize(
    ("head_dim", "dtype"),
    [(n, d) for n in (32, 64, 128, 256) for d in DTYPES if d != torch.float32 or n <= 128],
    ids=str,
)
def test_shared_memory_has_no_bank_conflicts(simt: Simt, dtype: torch.dtype, head_dim: int) -> None:
    """Tiles are written and read without a conflict, by every kernel."""
    case = contract.AttentionCase("", (64,), (80,), heads=1, kv_heads=1, head_dim=head_dim, value_dim=head_dim)
    counts: list = []
    contract.results(runs_on(simt, counts=counts), case.problem(dtype))
    for kind in ("ldmatrix", "cp_async", "load"):
        for passes, ideal in (c[kind] for c in counts):
            assert passes == ideal, f"{kind}: {passes} passes over the banks, {ideal} without conflicts"
    assert all(c["mma"] > 0 for c in counts)
