"""Absorbed attention: dtypes and instruction sets against float64; edges, refusals, tracing, the cost rule."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import fastxattn
import fastxattn.nn
from fastxattn.ops.absorbed_attention import absorbed_attention
from fastxattn.ops.absorbed_attention.cost import choose
from fastxattn.ops.absorbed_attention.problem import Problem
from fastxattn.ops.absorbed_attention.reference import absorbed_attention_reference
from fastxattn.runtime import native
from fastxattn.testing import assert_within_budget, offsets

ISAS = native.available_cpu_isas()
needs_native = pytest.mark.skipif(not ISAS, reason="the native library is not built")
Run = Callable[[Problem], tuple[Tensor, Tensor]]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def eager(problem: Problem) -> tuple[Tensor, Tensor]:
    """Plain PyTorch: products in the inputs' dtype, softmax in float32; the yardstick of the budget."""
    query, context, cu_q, cu_k, kv_range, key_bias, scale = problem.values()
    out = torch.zeros_like(query)
    lse = torch.full((query.shape[1], query.shape[0]), -torch.inf)
    for b in range(len(cu_q) - 1):
        rows, keys = (torch.arange(int(c[b]), int(c[b + 1])) for c in (cu_q, cu_k))
        if not len(rows) or not len(keys):
            continue
        q, x = query[rows].transpose(0, 1), context[keys]
        scores = (q @ x.T).float() * scale
        if key_bias is not None:
            scores = scores + key_bias[keys]
        if kv_range is not None:
            place, ranges = torch.arange(len(keys)), kv_range[rows]
            scores = scores.masked_fill((place < ranges[:, :1]) | (place >= ranges[:, 1:]), -torch.inf)
        none = (scores == -torch.inf).all(-1, keepdim=True)
        scores = scores.masked_fill(none, 0.0)
        weights = scores.softmax(-1).masked_fill(none, 0.0)
        out = out.index_copy(0, rows, (weights.to(query.dtype) @ x).transpose(0, 1))
        lse = lse.index_copy(1, rows, scores.logsumexp(-1).masked_fill(none[..., 0], -torch.inf))
    return out, lse


def on(backend: str) -> Run:
    """The public function on a backend."""
    return lambda problem: absorbed_attention(**vars(problem), return_lse=True, backend=backend)


@dataclass
class Case:
    """Inputs with two unused query rows and three unused context rows behind the last sequence."""

    lengths_q: list[int]
    lengths_k: list[int]
    heads: int
    width: int
    ranges: bool = False
    bias: bool = False

    def __post_init__(self) -> None:
        torch.manual_seed(len(self.lengths_q) + self.heads + self.width)
        self.cu_q, self.cu_k = offsets(self.lengths_q), offsets(self.lengths_k)
        rows_q, rows_k = sum(self.lengths_q) + 2, sum(self.lengths_k) + 3
        self.query, self.context = torch.randn(rows_q, self.heads, self.width), torch.randn(rows_k, self.width)
        self.kv_range = self.key_bias = None
        if self.ranges:
            # Wide enough that no row sees only a key or two: its gradient is then 0 by exact cancellation, of which
            # eager's rounding is a lucky draw and not a yardstick.
            start = torch.randint(-30, 10, (rows_q,))
            self.kv_range = torch.stack([start, start + torch.randint(60, 250, (rows_q,))], 1).int()
            self.kv_range[1] = torch.tensor([7, 7])
        if self.bias:
            self.key_bias = torch.randn(rows_k) * 0.5
        self.grad_out, self.grad_lse = torch.randn(self.query.shape), torch.randn(self.heads, rows_q)

    def problem(self, dtype: torch.dtype, rounded: torch.dtype) -> Problem:
        """Of inputs rounded to ``rounded``, in ``dtype``, with a gradient where fields have one."""
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        given: dict[str, Any] = {
            "query": self.query.to(rounded).to(dtype),
            "context": self.context.to(rounded).to(dtype),
            "key_bias": None if self.key_bias is None else self.key_bias.to(wide),
        }
        leaves = {n: None if t is None else t.clone().requires_grad_() for n, t in given.items()}
        sides = {"cu_seqlens_q": self.cu_q, "cu_seqlens_k": self.cu_k, "kv_range": self.kv_range}
        return Problem(**leaves, **sides, scale=self.width**-0.5)

    def results(self, dtype: torch.dtype, function: Run, rounded: torch.dtype) -> list[Tensor]:
        """Out, lse and the gradients of query, context and key_bias, of inputs rounded to ``rounded``."""
        problem = self.problem(dtype, rounded)
        out, lse = function(problem)
        loss = (out.double() * self.grad_out.to(rounded).double()).sum()
        loss = loss + (torch.where(lse.isfinite(), lse, 0).double() * self.grad_lse.double()).sum()
        leaves = [t for t in problem.differentiated() if t is not None]
        return [out, lse, *torch.autograd.grad(loss, leaves)]

    def check(self, dtype: torch.dtype, backend: str) -> None:
        reference = self.results(torch.float64, absorbed_attention_reference, dtype)
        plain = self.results(dtype, eager, dtype)
        found = self.results(dtype, on(backend), dtype)
        names = ["out", "lse", *(f"grad {name}" for name in Problem.bits)]
        for name, a, r, e in zip(names, found, reference, plain, strict=False):
            assert_within_budget(f"{name} {dtype}", a, r, e, backward=name.startswith("grad"))


CASES = {
    "ragged, odd width": Case([3, 0, 5, 7], [100, 5, 0, 300], 3, 37),
    "several panels": Case([32, 32], [500, 97], 12, 128),
    "one query, keys split": Case([1], [1700], 4, 48),
    "ranges and bias": Case([9, 1, 20], [130, 300, 50], 4, 96, ranges=True, bias=True),
    "ranges, odd width": Case([40, 3], [500, 7], 2, 33, ranges=True),
}


@pytest.fixture
def any_isa(request: pytest.FixtureRequest) -> Iterator[str]:
    native.force_cpu_isa(request.param)
    yield request.param
    native.force_cpu_isa("auto")


@needs_native
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_cpu_is_within_budget(case: Case, dtype: torch.dtype) -> None:
    case.check(dtype, "cpu")


@needs_native
@pytest.mark.parametrize("any_isa", ISAS, indirect=True)
def test_every_instruction_set_is_within_budget(any_isa: str) -> None:
    for dtype in DTYPES:
        Case([9, 1, 20], [130, 0, 250], 3, 35, ranges=True, bias=True).check(dtype, "cpu")


def test_reference_gradients() -> None:
    case = Case([2, 1], [3, 4], 2, 3, ranges=False, bias=True)
    inputs = [t.double().requires_grad_() for t in (case.query, case.context, case.key_bias)]  # type: ignore[union-attr]

    def call(query: Tensor, context: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = absorbed_attention(
            query, context, case.cu_q, case.cu_k, scale=0.7, key_bias=bias, return_lse=True, backend="reference"
        )
        return out, lse[:, :3]

    assert torch.autograd.gradcheck(call, inputs)


@needs_native
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_stays_where_it_is_seen(dtype: torch.dtype) -> None:
    case = Case([4, 70], [30, 200], 2, 33)
    starts = torch.tensor([[0, 10], [5, 30], [12, 20], [3, 3]], dtype=torch.int32)
    case.kv_range = torch.cat([starts, torch.tensor([[0, 200]], dtype=torch.int32).expand(72, 2)]).contiguous()
    case.kv_range[74:] = 0
    clean = case.results(dtype, on("cpu"), dtype)
    case.context[11] = torch.nan  # key 11 of the first sequence: seen by its second query alone
    case.context[230:] = torch.nan  # beyond the last offset
    case.query[74:] = torch.nan
    case.grad_out[3] = 0.0
    case.query[3] = torch.inf  # sees nothing
    dirty = case.results(dtype, on("cpu"), dtype)
    seen = torch.zeros(76, dtype=torch.bool)
    seen[1] = True
    assert dirty[0][1].isnan().all()
    assert torch.equal(dirty[0][~seen], clean[0][~seen])
    assert torch.equal(dirty[1][:, ~seen], clean[1][:, ~seen])
    assert torch.equal(dirty[2][~seen], clean[2][~seen])
    unseen = torch.ones(233, dtype=torch.bool)
    unseen[5:30] = False  # keys of the query that met the NaN
    assert torch.equal(dirty[3][unseen], clean[3][unseen])
    assert dirty[2][3].eq(0).all()
    assert dirty[3][230:].eq(0).all()


@needs_native
def test_rows_without_keys_give_zero_and_minus_infinity() -> None:
    query = torch.randn(4, 3, 8, requires_grad=True)
    context = torch.randn(5, 8, requires_grad=True)
    out, lse = absorbed_attention(query, context, offsets([2, 2]), offsets([0, 5]), return_lse=True, backend="cpu")
    assert out[:2].eq(0).all()
    assert lse[:, :2].eq(-torch.inf).all()
    assert lse[:, 2:].isfinite().all()
    out.sum().backward()
    assert query.grad is not None
    assert query.grad[:2].eq(0).all()


@needs_native
def test_empty_problems() -> None:
    nothing = torch.tensor([0], dtype=torch.int32)
    assert absorbed_attention(torch.zeros(0, 2, 8), torch.zeros(0, 8), nothing, nothing, backend="cpu").shape == (
        0,
        2,
        8,
    )
    query = torch.randn(0, 2, 8, requires_grad=True)
    context = torch.randn(6, 8, requires_grad=True)
    absorbed_attention(query, context, offsets([0, 0]), offsets([4, 2]), backend="cpu").sum().backward()
    assert context.grad is not None
    assert context.grad.eq(0).all()


@needs_native
def test_bitwise_equal_for_any_thread_count_neighbour_and_stride() -> None:
    case = Case([5, 40, 1], [700, 90, 333], 3, 64)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = case.results(torch.float32, on("cpu"), torch.float32)
    finally:
        torch.set_num_threads(threads)
    two = case.results(torch.float32, on("cpu"), torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    strided = case.query.transpose(0, 1).contiguous().transpose(0, 1)
    out = absorbed_attention(strided, case.context, case.cu_q, case.cu_k, scale=64**-0.5, backend="cpu")
    assert torch.equal(out, one[0])


@pytest.mark.parametrize("backend", ["reference", pytest.param("cpu", marks=needs_native)])
def test_key_index_reads_and_differentiates_selected_rows_only(backend: str) -> None:
    torch.manual_seed(0)
    query, context = torch.randn(3, 2, 16), torch.randn(20, 16)
    index = torch.tensor([7, 2, 2, 19, 11], dtype=torch.int32)
    dirty = torch.full_like(context, torch.nan)
    dirty[index.long()] = context[index.long()]
    dirty.requires_grad_()
    cu_q, cu_k = offsets([2, 1]), offsets([3, 2])
    out = absorbed_attention(query, dirty, cu_q, cu_k, scale=0.25, key_index=index, backend=backend)
    expected = absorbed_attention(query, context[index.long()], cu_q, cu_k, scale=0.25, backend="reference")
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)
    (grad,) = torch.autograd.grad(out.sum(), dirty)
    kept = torch.zeros(20, dtype=torch.bool)
    kept[index.long()] = True
    assert grad[~kept].eq(0).all()
    assert grad[kept].ne(0).any(1).all()


@needs_native
def test_bias_per_head_goes_to_the_reference_and_is_refused_by_name() -> None:
    case = Case([3], [9], 2, 8)
    bias = torch.randn(12, 2)
    out = absorbed_attention(case.query, case.context, case.cu_q, case.cu_k, key_bias=bias)
    assert out.isfinite().all()
    with pytest.raises(RuntimeError, match=r"key_bias of shape \(total_k,\)"):
        absorbed_attention(case.query, case.context, case.cu_q, case.cu_k, key_bias=bias, backend="cpu")


def test_refusals_name_the_argument() -> None:
    query, context, cu_q, cu_k = torch.randn(4, 2, 8), torch.randn(6, 8), offsets([1, 3]), offsets([2, 4])
    wrong: list[tuple[type[Exception], str, dict[str, object]]] = [
        (ValueError, "query must be", {"query": query[0]}),
        (TypeError, "context must be a tensor; got list", {"context": [1.0]}),
        (ValueError, "as wide as context", {"context": context[:, :4]}),
        (TypeError, "the dtype of query", {"context": context.half()}),
        (TypeError, "cu_seqlens_q must be int32", {"cu_seqlens_q": cu_q.long()}),
        (ValueError, "cu_seqlens_k must end within", {"cu_seqlens_k": offsets([2, 5])}),
        (ValueError, "must not decrease", {"cu_seqlens_k": torch.tensor([0, 3, 2], dtype=torch.int32)}),
        (ValueError, "start at 0", {"cu_seqlens_k": torch.tensor([1, 3, 4], dtype=torch.int32)}),
        (ValueError, "as many offsets", {"cu_seqlens_k": offsets([2])}),
        (ValueError, "kv_range must have shape", {"kv_range": torch.zeros(3, 2, dtype=torch.int32)}),
        (ValueError, "key_bias must have one row per key token, 6", {"key_bias": torch.zeros(5)}),
        (TypeError, "key_bias must be torch.float32 .* got torch.bool", {"key_bias": torch.ones(6).bool()}),
        (
            ValueError,
            "key_index must lie between 0 and 5; got 6",
            {"key_index": torch.tensor([0, 1, 2, 3, 4, 6], dtype=torch.int32)},
        ),
        (ValueError, "backend must be", {"backend": "quantum"}),
    ]
    for kind, message, change in wrong:
        arguments = {"query": query, "context": context, "cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k, **change}
        with pytest.raises(kind, match=message):
            absorbed_attention(**arguments)  # type: ignore[call-overload]


@needs_native
def test_opcheck_and_compile() -> None:
    case = Case([3, 4], [10, 20], 2, 16)
    op = torch.ops.fastxattn.absorbed_attention_cpu.default
    arguments = (case.query, case.context, case.cu_q, case.cu_k, None, None, 0.25)
    torch.library.opcheck(op, arguments)
    out, lse, softmax = op(*arguments)
    backward = torch.ops.fastxattn.absorbed_attention_backward_cpu.default
    torch.library.opcheck(backward, (torch.ones_like(out), None, out, lse, softmax, *arguments, 3))

    def call(query: Tensor, context: Tensor) -> Tensor:
        return absorbed_attention(query, context, case.cu_q, case.cu_k, scale=0.25) * 2

    query, context = case.query.requires_grad_(), case.context.requires_grad_()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(call(query, context).sum(), [query, context])
    for got, want in zip(torch.autograd.grad(compiled(query, context).sum(), [query, context]), expected, strict=True):
        assert torch.equal(got, want)


def test_cost_rule_projects_where_no_kernel_is_compiled() -> None:
    assert not choose(1, 100, 1, 12, 64, 1408, torch.float64).absorb
    on_gpu = choose(1, 100, 1, 12, 64, 1408, torch.float32, "cuda")
    assert not on_gpu.absorb
    assert "no compiled kernel" in str(on_gpu)


@needs_native
def test_cost_rule_counts_the_backward_pass_and_the_instruction_set(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: dict[str, Any] = {"rows_k": 544, "batch": 1, "heads": 12, "head_dim": 64, "width": 1408}
    for isa, forward, frozen, trained in (("avx512", True, True, True), ("avx2", True, False, False)):
        monkeypatch.setattr(native, "active_cpu_isa", lambda isa=isa: isa)
        assert choose(32, **sizes).absorb == forward
        assert choose(32, **sizes, backward=True).absorb == frozen
        assert choose(32, **sizes, backward=True, context_grad=True).absorb == trained
        assert choose(1, **sizes, backward=True).absorb
        assert not choose(128, **sizes).absorb


@needs_native
def test_cost_rule_absorbs_few_queries_and_says_so() -> None:
    few = choose(rows_q=12 * 32, rows_k=12 * 544, batch=12, heads=12, head_dim=64, width=1408)
    many = choose(rows_q=12 * 256, rows_k=12 * 544, batch=12, heads=12, head_dim=64, width=1408)
    one = choose(rows_q=12, rows_k=12 * 544, batch=12, heads=12, head_dim=64, width=1408)
    assert few.absorb
    assert one.absorb
    assert not many.absorb
    assert one.absorb_work < few.absorb_work < many.absorb_work
    module = fastxattn.nn.MultiheadCrossAttention(64, 4)
    text = str(fastxattn.explain(module, torch.randn(2, 2, 64), torch.randn(2, 50, 64)))
    assert "absorbed_attention" in text
    assert "absorb the projections" in text
    text = str(fastxattn.explain(module, torch.randn(2, 200, 64), torch.randn(2, 50, 64)))
    assert "project the context" in text
