"""Random problems of every operation: differentiable inputs, and a function of them on a named backend.

A trial is judged against the reference in float64 on the same rounded inputs. The yardstick is plain PyTorch in the
trial's dtype for attention, as in the tests, and the reference in that dtype for the others; see :func:`judge`.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fastxattn
from fastxattn.ops.attention import dispatch as attention_dispatch
from fastxattn.ops.pruning.ops import gather_rows, merge_rows
from fastxattn.testing import attention as contract
from fastxattn.testing import measure_error

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LENGTHS = (0, 1, 2, 5, 16, 17, 31, 64, 65, 130, 257)
SLACK = 8.0
"""How many times the yardstick's error an operation without an eager twin may have: a soak looks for what is wrong, the
tests hold every case to its budget."""


@dataclass(frozen=True)
class Trial:
    """One problem."""

    op: str
    case: str
    dtype: torch.dtype
    inputs: dict[str, Tensor]
    """Differentiable inputs, rounded to the dtype (scales and weights stay float32)."""
    function: Callable[[dict[str, Tensor], str], tuple[Tensor, ...]]
    exact: bool = False
    """Results are indices or copies: they must be equal."""


@dataclass(frozen=True)
class Judgement:
    """The worst result of a trial."""

    result: str
    error: float
    budget: float
    fault: str = ""

    @property
    def ok(self) -> bool:
        """Whether it is inside its budget."""
        return not self.fault and self.error <= self.budget


def lengths(r: random.Random, batch: int) -> list[int]:
    """Of every sequence; empty ones are common."""
    return [r.choice(LENGTHS) for _ in range(batch)]


def offsets(of: list[int]) -> Tensor:
    return torch.tensor([0, *of]).cumsum(0).to(torch.int32)


def rows(g: torch.Generator, dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=g).to(dtype)


def importance(r: random.Random, g: torch.Generator, dtype: torch.dtype) -> Trial:
    batch, heads, dim = r.randint(1, 4), r.choice((1, 2, 4)), r.choice((3, 16, 64, 80))
    of_q, of_k = lengths(r, batch), lengths(r, batch)
    inputs = {"query": rows(g, dtype, sum(of_q), heads, dim), "key": rows(g, dtype, sum(of_k), heads, dim)}
    cu_q, cu_k = offsets(of_q), offsets(of_k)
    wide = {n: t.double() for n, t in inputs.items()}
    _, lse = fastxattn.varlen_cross_attention(
        wide["query"], wide["key"], wide["key"], cu_q, cu_k, return_lse=True, backend="reference"
    )
    reduce, normalize = r.choice(("mean", "sum", "none")), r.random() < 0.3

    def run(x: dict[str, Tensor], backend: str) -> tuple[Tensor, ...]:
        wanted = lse if x["query"].dtype == torch.float64 else lse.float()
        score = fastxattn.key_importance(
            x["query"], x["key"], wanted, cu_q, cu_k, reduce=reduce, normalize=normalize, backend=backend  # type: ignore[arg-type]
        )  # fmt: skip
        return (score,)

    return Trial("importance", f"{of_q} x {of_k}, {heads} x {dim}, {reduce}, {normalize}", dtype, inputs, run)


def context(r: random.Random, g: torch.Generator, dtype: torch.dtype) -> Trial:
    batch, heads, width = r.randint(1, 3), r.choice((1, 3, 8)), r.choice((16, 48, 96, 130))
    of_q, of_k = [min(n, 65) for n in lengths(r, batch)], lengths(r, batch)
    inputs = {"query": rows(g, dtype, sum(of_q), heads, width), "context": rows(g, dtype, sum(of_k), width)}
    cu_q, cu_k, scale = offsets(of_q), offsets(of_k), width**-0.5

    def run(x: dict[str, Tensor], backend: str) -> tuple[Tensor, ...]:
        return fastxattn.context_attention(
            x["query"], x["context"], cu_q, cu_k, scale=scale, return_lse=True, backend=backend
        )

    return Trial("context_attention", f"{of_q} x {of_k}, {heads} x {width}", dtype, inputs, run)


def pair(loss: Callable[..., Any], name: str) -> Callable[[random.Random, torch.Generator, torch.dtype], Trial]:
    """A contrastive loss on unit features."""

    def make(r: random.Random, g: torch.Generator, dtype: torch.dtype) -> Trial:
        n, d, scale = r.choice((1, 2, 33, 64, 129, 300)), r.choice((1, 8, 63, 256)), r.choice((1.0, 14.3, 100.0))
        a, b = (F.normalize(torch.randn(n, d, generator=g), dim=1).to(dtype) for _ in range(2))
        options: dict[str, Any] = {"groups": torch.arange(n) // r.choice((1, 2, 7))} if r.random() < 0.3 else {}
        extra = (-5.0,) if loss is fastxattn.sigmoid_loss else ()

        def run(x: dict[str, Tensor], backend: str) -> tuple[Tensor, ...]:
            return (loss(x["a"], x["b"], x["scale"], *extra, backend=backend, **options),)

        return Trial(
            name, f"N={n} D={d} scale={scale} {[*options]}", dtype, {"a": a, "b": b, "scale": torch.tensor(scale)}, run
        )

    return make


def maxsim(r: random.Random, g: torch.Generator, dtype: torch.dtype) -> Trial:
    of_a, of_b = (lengths(r, r.randint(1, 5)) for _ in range(2))
    d = r.choice((1, 8, 63, 128))
    inputs = {
        n: F.normalize(torch.randn(sum(of), d, generator=g), dim=1).to(dtype) for n, of in (("a", of_a), ("b", of_b))
    }
    direction = r.choice(("a", "b"))

    def run(x: dict[str, Tensor], backend: str) -> tuple[Tensor, ...]:
        return (fastxattn.maxsim(x["a"], x["b"], offsets(of_a), offsets(of_b), direction=direction, backend=backend),)

    return Trial("maxsim", f"{of_a} x {of_b}, D={d}, {direction}", dtype, inputs, run)


def topk(r: random.Random, g: torch.Generator, dtype: torch.dtype) -> Trial:
    """Whole numbers: every product is exact, ties abound, and order is decided."""
    n, m, d = r.choice((0, 1, 7, 65)), r.choice((0, 1, 50, 1000)), r.choice((1, 16, 63))
    inputs = {k: torch.randint(-3, 4, (s, d), generator=g).to(dtype) for k, s in (("a", n), ("b", m))}
    k = r.randint(1, 9)

    def run(x: dict[str, Tensor], backend: str) -> tuple[Tensor, ...]:
        with torch.no_grad():
            return fastxattn.topk_similarity(x["a"], x["b"], k, backend=backend)

    return Trial("topk", f"{n} of {m} x {d}, k={k}", dtype, inputs, run, exact=True)


def select(r: random.Random, g: torch.Generator, dtype: torch.dtype) -> Trial:
    of = lengths(r, r.randint(1, 6))
    scores = torch.randint(-3, 4, (sum(of),), generator=g).float()
    scores[torch.rand(sum(of), generator=g) < 0.1] = torch.nan
    budget = r.choice((fastxattn.Budget.count(5), fastxattn.Budget.ratio(0.3), fastxattn.Budget.total(40)))
    protected = torch.rand(sum(of), generator=g) < 0.1

    def run(x: dict[str, Tensor], backend: str) -> tuple[Tensor, ...]:
        kept = fastxattn.select(scores, offsets(of), budget, protected=protected, backend=backend)
        return kept.keep_index, kept.cu_seqlens

    return Trial("select", f"{of}, {budget}", dtype, {}, run, exact=True)


def gather_merge(r: random.Random, g: torch.Generator, dtype: torch.dtype) -> Trial:
    n, kept, d = r.choice((1, 30, 200)), r.choice((1, 20, 120)), r.choice((1, 17, 64))
    index = torch.randint(-1, n, (kept,), generator=g).int()
    assignment = torch.randint(-1, kept, (n,), generator=g).int()

    def run(x: dict[str, Tensor], backend: str) -> tuple[Tensor, ...]:
        return gather_rows(x["x"], index, backend=backend), merge_rows(x["x"], assignment, None, kept, backend=backend)

    return Trial("gather and merge", f"{n} -> {kept}, D={d}", dtype, {"x": rows(g, dtype, n, d)}, run)


MAKERS: dict[str, Callable[[random.Random, torch.Generator, torch.dtype], Trial]] = {
    "importance": importance,
    "context_attention": context,
    "infonce": pair(fastxattn.infonce_loss, "infonce"),
    "sigmoid": pair(fastxattn.sigmoid_loss, "sigmoid"),
    "maxsim": maxsim,
    "topk": topk,
    "select": select,
    "gather and merge": gather_merge,
}


def results(trial: Trial, backend: str, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """Results and gradients of a trial; ``dtype`` converts its inputs first."""
    leaves = {n: t.detach().to(dtype or t.dtype).requires_grad_(not trial.exact) for n, t in trial.inputs.items()}
    out = trial.function(leaves, backend)
    found = {f"out {i}": t.detach() for i, t in enumerate(out)}
    if leaves and not trial.exact:
        g = torch.Generator().manual_seed(1)
        weights = [torch.randn(t.shape, generator=g, dtype=torch.float64).to(t.dtype) for t in out]
        # Rows that see nothing have an lse of -inf: no weight there.
        total = sum((t.masked_fill(t == -torch.inf, 0) * w).sum().double() for t, w in zip(out, weights, strict=True))
        grads = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)  # type: ignore[arg-type]
        found |= {
            f"grad {n}": torch.zeros_like(leaves[n]) if d is None else d for n, d in zip(leaves, grads, strict=True)
        }
    return found


def judge(trial: Trial, backend: str) -> Judgement:
    """The result with the largest error beside its budget."""
    ours = results(trial, backend, None)
    if trial.exact:
        wanted = results(trial, "reference", None)
        wrong = [n for n in ours if not torch.equal(ours[n], wanted[n])]
        return Judgement("all", 0.0, 0.0, f"{', '.join(wrong)} differ" if wrong else "")
    truth, yard = results(trial, "reference", torch.float64), results(trial, "reference", None)
    worst = Judgement("none", 0.0, 1.0)
    for name, value in ours.items():
        report = measure_error(name, value, truth[name], yard[name], backward=name.startswith("grad"))
        if not report.same_nonfinite:
            return Judgement(name, report.max_error, report.max_budget, "NaN or infinity in other places")
        biggest = truth[name][truth[name].isfinite()].abs().max().item() if truth[name].isfinite().any() else 0.0
        rounding = torch.finfo(trial.dtype).eps * biggest
        found = Judgement(name, report.max_error, SLACK * (report.max_budget + rounding))
        if found.error * worst.budget > worst.error * found.budget:
            worst = found
    return worst


def judge_attention(r: random.Random, dtype: torch.dtype, backend: str) -> tuple[str, Judgement]:
    """A random case of the attention contract, under the tests' own yardstick: plain PyTorch in the same dtype."""
    batch, kv_heads = r.randint(1, 4), r.choice((1, 2, 3))
    small = (0, 1, 2, 5, 16, 17, 33) if backend == "triton" else LENGTHS
    of_q, of_k = ([r.choice(small) for _ in range(batch)] for _ in range(2))
    if not any(q and k for q, k in zip(of_q, of_k, strict=True)):
        of_q[0] = of_k[0] = 1  # the eager yardstick has no gradient where nothing sees anything; tests cover that
    case = contract.AttentionCase(
        "random", tuple(of_q), tuple(of_k),
        kv_heads * r.choice((1, 1, 2)), kv_heads, r.choice((1, 8, 33, 64, 80, 128)), r.choice((1, 16, 64, 72)),
        r.choice((0.0, 0.0, 3.0)), r.choice((0.0, 0.0, 0.3)), r.choice(("", "", "random", "causal")),
        r.choice(("", "", "row", "head")), None, r.random() < 0.2, False,
    )  # fmt: skip
    problem = case.problem(dtype, seed=r.randrange(1 << 30))

    ours = contract.results(functools.partial(attention_dispatch.run, backend), problem)
    truth, eager = contract.expectations(problem)
    worst = Judgement("none", 0.0, 1.0)
    for name, value in ours.items():
        report = measure_error(name, value, truth[name], eager[name], backward=name.startswith("grad"))
        if not report.same_nonfinite:
            return str(case), Judgement(name, report.max_error, report.max_budget, "NaN or infinity in other places")
        found = Judgement(name, report.max_error, report.max_budget)
        if found.error * max(worst.budget, 1e-300) > worst.error * max(found.budget, 1e-300):
            worst = found
    return repr(case), worst
