"""Every attention backend against the float64 reference: budgets, instruction sets, isolation, repeatability."""

import functools
from collections import defaultdict

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fastxattn.ops.attention import backends
from fastxattn.ops.attention.dropout import keep_mask, philox
from fastxattn.ops.attention.problem import Problem
from fastxattn.runtime import native
from fastxattn.testing import attention as contract
from fastxattn.testing.attention import ATTENTION_CASES, AttentionCase
from fastxattn.testing.budget import of_few

BACKENDS = ("reference", "cpu")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BY_NAME = {case.name: case for case in ATTENTION_CASES}


def runner(backend: str):
    if backend == "cpu" and (reason := native.cpu_library().reason):
        pytest.skip(reason)
    return functools.partial(backends.run_on, backend)


@pytest.fixture(params=BACKENDS)
def run(request):
    return runner(request.param)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


# More keys than the backward pass keeps the weights of.
LONG = AttentionCase("long", (70, 3), (2500, 2400), heads=2, kv_heads=1, kv_range="random")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [*ATTENTION_CASES, LONG], ids=str)
def test_budget(case, dtype):
    """The reference, and the CPU kernel on every instruction set, forward and every gradient."""
    problem = case.problem(dtype)
    expected = contract.expectations(problem)
    contract.check_budget(runner("reference"), problem, expected=expected)
    run = runner("cpu")
    try:
        for isa in native.available_cpu_isas():
            native.force_cpu_isa(isa)
            try:
                contract.check_budget(run, problem, expected=expected)
            except AssertionError as error:
                raise AssertionError(f"on {isa}: {error}") from None
    finally:
        native.force_cpu_isa("auto")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", ATTENTION_CASES, ids=str)
def test_unseen_rows_may_hold_nan(run, case, dtype):
    contract.check_unseen(run, case.problem(dtype))


@pytest.mark.parametrize("name", ["ragged", "range", "key_index", "everything"])
def test_unseen_rows_may_hold_infinity(run, name):
    contract.check_unseen(run, BY_NAME[name].problem(torch.float32), junk=float("inf"))


@pytest.mark.parametrize("name", ["ragged", "range", "range_gqa", "key_bias", "causal"])
@pytest.mark.parametrize("where", ["query", "key", "value"])
def test_nan_in_a_valid_row_stays_in_rows_that_see_it(run, name, where):
    """Non-finite results in exactly the places where the reference has them, forward and backward."""
    problem = BY_NAME[name].problem(torch.float32)
    seen = contract.rows_in_use(problem)[where != "query"].nonzero()[:, 0]
    t = getattr(problem, where).clone()
    t[seen[len(seen) // 2], min(1, t.shape[1] - 1), 2] = float("nan")
    problem = problem.replace(**{where: t})
    found = contract.results(run, problem)
    wanted = contract.results(contract.run_reference, contract.in_float64(problem))
    assert found["out"].isnan().any()
    for result, t in found.items():
        assert torch.equal(t.isnan(), wanted[result].isnan()), f"{result} has NaN in other places"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", ATTENTION_CASES, ids=str)
def test_bitwise_for_any_thread_count(case, dtype, threads):
    problem, run = case.problem(dtype), runner("cpu")
    threads(1)
    one = contract.results(run, problem)
    for count in (2, 3, 5):
        threads(count)
        for name, t in contract.results(run, problem).items():
            assert torch.equal(t, one[name]), f"{name} differs with {count} threads"


@pytest.mark.parametrize(
    "name", ["dense", "ragged", "decode", "split_keys", "tall", "gqa", "range", "causal", "key_bias"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_batch_neighbours_do_not_matter(name, dtype):
    contract.check_neighbours(runner("cpu"), BY_NAME[name].problem(dtype))


@pytest.mark.parametrize("name", ["dense", "ragged", "everything"])
def test_repeatable_with_deterministic_algorithms(run, name):
    torch.use_deterministic_algorithms(True)
    try:
        contract.check_repeatable(run, BY_NAME[name].problem(torch.float32))
    finally:
        torch.use_deterministic_algorithms(False)


@st.composite
def cases(draw):
    pairs = draw(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 150)), min_size=1, max_size=5))
    kv_heads = draw(st.integers(1, 3))
    padded = draw(st.booleans())
    return AttentionCase(
        "drawn",
        tuple(n for n, _ in pairs),
        tuple(m for _, m in pairs),
        heads=kv_heads * draw(st.integers(1, 3)),
        kv_heads=kv_heads,
        head_dim=draw(st.integers(1, 256)),
        value_dim=draw(st.integers(1, 256)),
        softcap=draw(st.sampled_from([0.0, 3.0])),
        dropout_p=draw(st.sampled_from([0.0, 0.0, 0.4])),
        kv_range=draw(st.sampled_from(["", "random", "causal"])),
        key_bias=draw(st.sampled_from(["", "row", "head"])),
        bias=draw(st.sampled_from([None, (1, 1, 1, 1), (0, 1, 0, 1)])) if padded else None,
        key_index=not padded and draw(st.booleans()),
        padded=padded,
    )


def test_any_shape():
    """Random shapes and options: close to float64 everywhere, and zeros, NaN and infinities in the same places.

    Two equally good roundings of n numbers differ by luck: the ratio of their mean errors passes 1.25 with a chance of
    12 % at n = 32 and 1 % at 128 (and numbers of one row err together, so n counts for less); of largest errors see
    ``of_few``. So largest errors keep the budget where many numbers decide them, few are held to rounding itself, and
    mean errors keep theirs over all shapes together.
    """
    run, means = runner("cpu"), defaultdict(list)

    @given(cases(), st.sampled_from([torch.float32, torch.bfloat16]), st.integers(0, 2**31))
    @settings(max_examples=60, deadline=None, derandomize=True)
    def one(case, dtype, seed):
        problem = case.problem(dtype, seed=seed)
        assume(bool(contract.rows_in_use(problem)[0].any()))  # where nothing is seen: tests/test_attention_inputs.py
        found = contract.results(run, problem)
        oracle, eager = contract.expectations(problem)
        for name, t in found.items():
            report = contract.measure_error(name, t, oracle[name], eager[name], backward=name.startswith("grad_"))
            assert report.same_nonfinite, str(report)
            few = of_few(name, oracle, torch.float32 if name == "lse" else dtype)
            assert report.max_error <= max(report.max_budget, few), str(report)
            means[name, dtype].append((report.mean_error * t.numel(), report.mean_budget * t.numel()))
        contract.check_unseen(run, problem)

    one()
    for what, pairs in means.items():
        error, budget = (sum(column) for column in zip(*pairs, strict=True))
        assert error <= budget, f"{what}: mean errors of all shapes sum to {error:.3g}, their budgets to {budget:.3g}"


# Dropout ---------------------------------------------------------------------------------------------------------


def test_philox_known_answers():
    """The first and the all-ones vector of the generator's published known answers (Random123)."""
    zero, ones = torch.tensor(0), torch.tensor(0xFFFFFFFF)
    assert [int(w) for w in philox((zero,) * 4, (zero,) * 2)] == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    assert [int(w) for w in philox((ones,) * 4, (ones,) * 2)] == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]


@pytest.mark.parametrize("seed", [0, 1234567890123456789, -5])
def test_dropout_mask_is_the_same_on_every_backend(seed):
    """With one-hot values the output is the weights, so the mask can be read off: equal, not just close."""
    lengths_q, lengths_k, heads, p = (3, 9), (40, 61), 2, 0.3
    cu_q, cu_k = torch.tensor([0, 3, 12], dtype=torch.int32), torch.tensor([0, 40, 101], dtype=torch.int32)
    value = torch.cat([torch.eye(n, 64) for n in lengths_k])[:, None].expand(-1, heads, -1).contiguous()
    g = torch.Generator().manual_seed(1)
    query, key = torch.randn(12, heads, 16, generator=g), torch.randn(101, heads, 16, generator=g)
    problem = Problem(
        query=query,
        key=key,
        value=value,
        cu_seqlens_q=cu_q,
        cu_seqlens_k=cu_k,
        dropout_p=p,
        dropout_seed=torch.tensor([seed]),
    )
    plain = backends.run_on("reference", problem.replace(dropout_p=0.0, dropout_seed=None))
    for backend in BACKENDS:
        out, lse = runner(backend)(problem)
        torch.testing.assert_close(lse.float(), plain[1], msg="dropout must not change lse")
        row = 0
        for n, m in zip(lengths_q, lengths_k, strict=True):
            mask = keep_mask(torch.arange(row, row + n), torch.arange(m), heads, p, torch.tensor([seed]))
            got = out[row : row + n, :, :m].transpose(0, 1)
            assert torch.equal(got != 0, mask), backend
            torch.testing.assert_close(got, plain[0][row : row + n, :, :m].transpose(0, 1) * mask / (1 - p))
            row += n


def test_dropout_statistics():
    """Each weight is kept with probability 1 - p, whatever its neighbours do."""
    p, heads = 0.3, 4
    mask = keep_mask(torch.arange(500), torch.arange(512), heads, p, torch.tensor([7])).double()
    n = mask.numel()
    assert abs(mask.mean() - (1 - p)) < 4 * (p * (1 - p) / n) ** 0.5
    dropped = mask - (1 - p)
    for pair in (
        (dropped[:, :, 1:], dropped[:, :, :-1]),
        (dropped[:, 1:], dropped[:, :-1]),
        (dropped[1:], dropped[:-1]),
    ):
        assert abs((pair[0] * pair[1]).mean()) < 5 * p * (1 - p) / n**0.5
    other = keep_mask(torch.arange(500), torch.arange(512), heads, p, torch.tensor([8])).double()
    assert abs(((other - (1 - p)) * dropped).mean()) < 5 * p * (1 - p) / n**0.5
