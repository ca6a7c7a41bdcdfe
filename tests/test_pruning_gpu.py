"""The GPU kernels of pruning against the oracle: Triton's in its interpreter too."""

from __future__ import annotations

import functools
import importlib
import itertools

import pytest
import torch

pytest.importorskip("triton")
from fastxattn.ops import pruning
from fastxattn.ops.pruning import STRATEGIES, Budget, reference
from fastxattn.ops.pruning.problem import PROBLEMS
from tests.device import BACKENDS, RUNS, WHY_NOT, there

pytestmark = pytest.mark.skipif(not RUNS, reason=WHY_NOT)
TOTAL = 165  # the last five belong to nobody
CU = torch.tensor([0, 5, 5, 70, 160], dtype=torch.int32)
prune_tokens = there(pruning.prune_tokens)


@pytest.fixture(params=BACKENDS)
def backend(request):
    return request.param


def kernel(backend, name):
    """The launcher of that operation in a backend's module, on the tests' device."""
    module = importlib.import_module(f"fastxattn.ops.pruning.kernels_{backend}")
    function = PROBLEMS[name].positional(getattr(module, name))
    return functools.partial(there(lambda *arguments, backend: function(*arguments)), backend=backend)


def oracle(name, *arguments):
    """The reference's results of that operation."""
    return getattr(reference, name)(PROBLEMS[name].of(arguments))


def same(got, want):
    for a, b in zip((t.cpu() for t in got), want, strict=True):  # of a selection's tensors `there` knows nothing
        assert a.dtype == b.dtype and torch.equal(a.nan_to_num(nan=-9.0), b.nan_to_num(nan=-9.0)), (a, b)


@pytest.fixture
def data():
    """Scores with ties and what is no number, a guard of some, and tokens."""
    g = torch.Generator().manual_seed(0)
    scores = torch.randn(TOTAL, generator=g).round(decimals=1)
    scores[::7], scores[3], scores[1], scores[2] = float("nan"), -0.0, float("inf"), -float("inf")
    return scores, torch.rand(TOTAL, generator=g) < 0.05, torch.randn(TOTAL, 33, generator=g)


@pytest.mark.parametrize(("k", "guarded"), [(0, False), (3, True), (1, False), (64, False), (1000, True)])
def test_select(backend, data, k, guarded):
    scores, guard, x = data
    counts = torch.full((4,), k, dtype=torch.int32)
    arguments = (scores, CU, counts, guard if guarded else None, x, 120)
    same(kernel(backend, "select")(*arguments), oracle("select", *arguments))


def test_quantile_and_gather(data):
    scores, _, x = data
    arguments = (scores, CU, torch.tensor([0, 0.77, 1.0]))
    same([kernel("triton", "quantile")(*arguments)], [oracle("quantile", *arguments)])
    place = torch.randint(-1, 9, (TOTAL,), dtype=torch.int32)
    for weight in (None, torch.rand(TOTAL)):
        same([kernel("triton", "gather")(x, place, weight)], [oracle("gather", x, place, weight)])


def test_merge(backend, data):
    x, place = data[2], torch.randint(-1, 9, (TOTAL,), dtype=torch.int32)
    for weight in (None, torch.rand(TOTAL)):
        found, wanted = kernel(backend, "merge")(x, place, weight, 10), oracle("merge", x, place, weight, 10)
        torch.testing.assert_close(found, wanted, rtol=0, atol=2e-6)


def awkward(x):
    """Among the tokens a zero, what is no number, and two that are equal."""
    x[7], x[9], x[20], x[40] = 0, float("nan"), x[30], x[30]
    return x


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_match(backend, data, dtype):
    x = awkward(data[2]).to(dtype)
    a, b = torch.arange(0, 160, 2, dtype=torch.int32), torch.arange(1, 160, 2, dtype=torch.int32)
    cu_a, cu_b = (torch.tensor(t, dtype=torch.int32) for t in ([0, 3, 3, 35, 80], [0, 2, 2, 35, 80]))
    best, near = kernel(backend, "match")(x, a, cu_a, b, cu_b)
    wanted, exact = oracle("match", x, a, cu_a, b, cu_b)
    assert torch.equal(best, wanted)
    torch.testing.assert_close(near, exact, rtol=0, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_greedy(data, dtype):
    x, guard, quality = awkward(data[2]).to(dtype), data[1], torch.rand(TOTAL)
    quality[100] = float("nan")
    counts = torch.tensor([3, 2, 8, 6], dtype=torch.int32)
    every = itertools.product((0, 1), (None, guard))
    for mode, protected in every if dtype == torch.float32 else ((0, None), (1, guard)):
        arguments = (x, quality, CU, counts, protected, mode, 66)
        same([kernel("triton", "greedy")(*arguments)], [oracle("greedy", *arguments)])


def test_through_the_public_functions_by_name(backend, data):
    scores, _, x = data
    rows, kept = prune_tokens(x, scores, CU, Budget.ratio(0.4), backend=backend)
    wanted, other = prune_tokens(x, scores, CU, Budget.ratio(0.4), backend="reference")
    same([rows[: len(wanted)], kept_of(kept)], [wanted, other.keep_index])


def kept_of(selection):
    """The index without what follows it on a GPU, where nobody waits for the number of tokens kept."""
    number = int(selection.cu_seqlens[-1])
    assert (selection.keep_index[number:] == -1).all()
    return selection.keep_index[:number]


@pytest.mark.parametrize("name", ["evit", "divprune", "visionzip", "tome"])
def test_strategies(name):
    g = torch.Generator().manual_seed(1)
    x, attention = torch.randn(TOTAL, 8, generator=g), torch.rand(TOTAL, generator=g)
    needs = {"attention": attention} if "attention" in STRATEGIES[name].needs else {}
    strategy = there(STRATEGIES[name])
    got, want = (strategy(x, CU, Budget.count(34), backend=b, **needs) for b in ("triton", "reference"))
    same([kept_of(got), got.assignment, got.cu_seqlens], [want.keep_index, want.assignment, want.cu_seqlens])
