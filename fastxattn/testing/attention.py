"""What every attention backend must do, as functions that raise AssertionError when one does not.

A backend is given as ``run``, which takes a :class:`Problem` and returns differentiable (out, lse). The cases of
:data:`ATTENTION_CASES` exercise every argument of the operator; use them like this::

    @pytest.mark.parametrize("case", ATTENTION_CASES, ids=str)
    def test_budget(case):
        check_budget(run, case.problem(torch.float32))
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastxattn.ops.attention.dropout import keep_mask
from fastxattn.ops.attention.problem import Problem
from fastxattn.ops.attention.reference import attention_reference
from fastxattn.testing import inputs
from fastxattn.testing.budget import ErrorReport, assert_together, measure_error

Run = Callable[[Problem], tuple[Tensor, Tensor]]
Expected = tuple[dict[str, Tensor], dict[str, Tensor]]
DIFFERENTIABLE = tuple(Problem.bits)


@dataclass(frozen=True)
class AttentionCase:
    """A kind of attention problem, small enough for every backend and instruction set."""

    name: str
    lengths_q: tuple[int, ...]
    lengths_k: tuple[int, ...]
    heads: int = 4
    kv_heads: int = 4
    head_dim: int = 64
    value_dim: int = 64
    softcap: float = 0.0
    dropout_p: float = 0.0
    kv_range: str = ""  # random, causal or ""
    key_bias: str = ""  # row, head or ""
    bias: tuple[int, int, int, int] | None = None  # which axes are full (1) and which broadcast (0)
    key_index: bool = False  # keys are a shuffled part of the rows
    padded: bool = False  # rows in a padded layout, valid tokens in a random pattern

    def __str__(self) -> str:
        return self.name

    def problem(self, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> Problem:
        """Random inputs of this kind."""
        g = torch.Generator().manual_seed(seed)
        wide = torch.promote_types(dtype, torch.float32)
        batch = len(self.lengths_q)
        side_q = _side(self.lengths_q, self.padded, False, g)
        side_k = _side(self.lengths_k, self.padded, self.key_index, g)
        query = torch.randn(side_q.rows, self.heads, self.head_dim, generator=g)
        key = torch.randn(side_k.rows, self.kv_heads, self.head_dim, generator=g)
        value = torch.randn(side_k.rows, self.kv_heads, self.value_dim, generator=g)
        key_bias = bias = None
        if self.key_bias:
            shape: tuple[int, ...] = (side_k.rows,) if self.key_bias == "row" else (side_k.rows, self.heads)
            key_bias = torch.randn(shape, generator=g).to(wide)
        if self.bias is not None:
            full = (batch, self.heads, side_q.place, side_k.place)
            shape = tuple(n if on else 1 for n, on in zip(full, self.bias, strict=True))
            bias = torch.randn(shape, generator=g).to(dtype)
        tensors: dict[str, Tensor | None] = {
            "query": query.to(dtype),
            "key": key.to(dtype),
            "value": value.to(dtype),
            "cu_seqlens_q": side_q.offsets,
            "cu_seqlens_k": side_k.offsets,
            "seqused_q": side_q.used,
            "seqused_k": side_k.used,
            "query_index": side_q.index,
            "key_index": side_k.index,
            "kv_range": _ranges(self.kv_range, side_q, self.lengths_k, g),
            "key_bias": key_bias,
            "bias": bias,
            "dropout_seed": torch.randint(-(2**62), 2**62, (1,), generator=g) if self.dropout_p else None,
        }
        moved: dict[str, Any] = {name: None if t is None else t.to(device) for name, t in tensors.items()}
        numbers = {name: getattr(self, name) for name in Problem.numbers if name != "scale"}
        return Problem(**moved, scale=self.head_dim**-0.5, **numbers)


_RAGGED_Q, _RAGGED_K = (5, 0, 77, 1, 33, 16), (64, 33, 0, 200, 129, 7)
ATTENTION_CASES = (
    AttentionCase("dense", (32, 32), (257, 257), heads=3, kv_heads=3),
    AttentionCase("ragged", _RAGGED_Q, _RAGGED_K),
    AttentionCase("decode", (1,) * 6, (300, 1, 0, 64, 513, 17)),
    AttentionCase("split_keys", (2,), (5000,), heads=2, kv_heads=2),
    AttentionCase("tall", (600,), (9,), heads=2, kv_heads=2),
    AttentionCase("gqa", _RAGGED_Q, _RAGGED_K, heads=6, kv_heads=2),
    AttentionCase("mqa_decode", (1, 3, 1), (300, 40, 1), heads=8, kv_heads=1),
    AttentionCase("dims_1_1", (9, 40), (31, 70), head_dim=1, value_dim=1),
    AttentionCase("dims_3_17", (9, 40), (31, 70), head_dim=3, value_dim=17),
    AttentionCase("dims_80_48", (9, 40), (31, 70), head_dim=80, value_dim=48),
    AttentionCase("dims_129_200", (9, 40), (31, 70), heads=2, kv_heads=1, head_dim=129, value_dim=200),
    AttentionCase("dims_256_256", (9, 40), (31, 70), heads=2, kv_heads=2, head_dim=256, value_dim=256),
    AttentionCase("softcap", _RAGGED_Q, _RAGGED_K, softcap=2.0),
    AttentionCase("range", _RAGGED_Q, _RAGGED_K, kv_range="random"),
    AttentionCase("range_gqa", _RAGGED_Q, _RAGGED_K, heads=6, kv_heads=2, kv_range="random"),
    AttentionCase("causal", (70, 0, 129), (70, 5, 129), kv_range="causal"),
    AttentionCase("key_bias", _RAGGED_Q, _RAGGED_K, key_bias="row"),
    AttentionCase("key_bias_heads", _RAGGED_Q, _RAGGED_K, heads=6, kv_heads=3, key_bias="head"),
    AttentionCase("key_index", _RAGGED_Q, _RAGGED_K, key_index=True, key_bias="row", heads=4, kv_heads=2),
    AttentionCase("padded", _RAGGED_Q, _RAGGED_K, padded=True),
    AttentionCase("bias", _RAGGED_Q, _RAGGED_K, padded=True, bias=(1, 1, 1, 1)),
    AttentionCase("bias_heads", _RAGGED_Q, _RAGGED_K, padded=True, bias=(0, 1, 1, 1)),
    AttentionCase("bias_keys", _RAGGED_Q, _RAGGED_K, padded=True, bias=(1, 0, 0, 1)),
    AttentionCase("dropout", _RAGGED_Q, _RAGGED_K, dropout_p=0.3),
    AttentionCase(
        "everything",
        _RAGGED_Q,
        _RAGGED_K,
        heads=6,
        kv_heads=2,
        head_dim=48,
        value_dim=40,
        softcap=5.0,
        dropout_p=0.2,
        kv_range="random",
        key_bias="head",
        bias=(1, 1, 1, 1),
        padded=True,
    ),
)
NEIGHBOURS = AttentionCase(
    "neighbours", (1, 70, 33, 3, 20, 32), (1100, 1024, 1030, 40, 1023, 1600), heads=2, kv_heads=1
)
"""For :func:`check_neighbours`: few rows and many, few keys and many, whose averages are neither, so that a schedule
that is chosen for the whole batch gives a sequence other bits than alone."""


@dataclass(frozen=True)
class _Side:
    """One side's slots: where they start, how many are in use, and which rows they stand for."""

    offsets: Tensor
    used: Tensor | None
    index: Tensor | None
    rows: int
    place: int  # one more than the furthest row from its sequence's first
    lengths: tuple[int, ...]


def _side(lengths: tuple[int, ...], padded: bool, shuffled: bool, g: torch.Generator) -> _Side:
    batch, longest = len(lengths), max(lengths)
    if padded:
        width = longest + 3
        index = torch.cat([torch.randperm(width, generator=g).int() + b * width for b in range(batch)])
        for b, n in enumerate(lengths):  # valid tokens keep their order
            index[b * width : b * width + n] = index[b * width : b * width + n].sort().values
        offsets = torch.arange(batch + 1, dtype=torch.int32) * width
        return _Side(offsets, torch.tensor(lengths, dtype=torch.int32), index, batch * width, width, lengths)
    offsets = inputs.offsets(lengths)
    total = int(offsets[-1])
    rows = total + 5  # rows that belong to nobody
    picked = torch.randperm(rows, generator=g)[:total].int() if shuffled else None
    return _Side(offsets, None, picked, rows, longest, lengths)


def _ranges(kind: str, side: _Side, lengths_k: tuple[int, ...], g: torch.Generator) -> Tensor | None:
    """(rows, 2): random ones may be empty; those of rows that belong to nobody are senseless."""
    if not kind:
        return None
    ranges = torch.full((side.rows, 2), 7, dtype=torch.int32)
    for b, (n, keys) in enumerate(zip(side.lengths, lengths_k, strict=True)):
        first = int(side.offsets[b])
        slots = torch.arange(first, first + n)
        rows = slots if side.index is None else side.index[slots].long()
        if kind == "causal":
            ends = (torch.arange(n) + 1 + keys - n).clamp(min=0)
            ranges[rows] = torch.stack([torch.zeros_like(ends), ends], 1).int()
        else:
            places = torch.randint(-5, keys + 6, (n, 2), generator=g, dtype=torch.int32)
            ranges[rows] = places.clamp(0, keys).sort(1).values
    return ranges


def eager_attention(problem: Problem) -> tuple[Tensor, Tensor]:
    """Plain PyTorch in the dtype of the inputs, a dense mask per sequence: the yardstick of the error budget."""
    p = problem
    dtype, wide = p.query.dtype, torch.promote_types(p.query.dtype, torch.float32)
    heads, groups = p.query.shape[1], p.query.shape[1] // p.key.shape[1]
    out = p.query.new_zeros(p.query.shape[0], heads, p.value.shape[2])
    lse = p.query.new_full((heads, p.query.shape[0]), -torch.inf, dtype=wide)
    for b in range(p.cu_seqlens_q.shape[0] - 1):
        rows = _sequence_rows(p.cu_seqlens_q, p.seqused_q, p.query_index, b)
        seen = _sequence_rows(p.cu_seqlens_k, p.seqused_k, p.key_index, b)
        if not len(rows) or not len(seen):
            continue
        q, k, v = (t.transpose(0, 1) for t in (p.query[rows], p.key[seen], p.value[seen]))
        scores = q @ k.repeat_interleave(groups, 0).mT * p.scale
        scores = p.softcap * torch.tanh(scores / p.softcap) if p.softcap else scores
        if p.key_bias is not None:
            scores = scores + p.key_bias[seen].to(dtype).reshape(len(seen), -1).T[:, None]
        if p.bias is not None:
            part = p.bias.expand(p.cu_seqlens_q.shape[0] - 1, *p.bias.shape[1:])[b]
            part = part[:, rows - p.cu_seqlens_q[b]] if part.shape[1] > 1 else part
            part = part[:, :, seen - p.cu_seqlens_k[b]] if part.shape[2] > 1 else part
            scores = scores + part
        if p.kv_range is not None:
            slot = torch.arange(len(seen), device=rows.device)
            hidden = (slot < p.kv_range[rows, :1]) | (slot >= p.kv_range[rows, 1:])
            scores = scores.masked_fill(hidden, -torch.inf)
        none = (scores == -torch.inf).all(-1, keepdim=True)
        weights = torch.softmax(scores.masked_fill(none, 0.0), -1).masked_fill(none, 0.0)
        if p.dropout_p and p.dropout_seed is not None:
            slots = torch.arange(len(seen), device=rows.device)
            weights = weights * keep_mask(rows, slots, heads, p.dropout_p, p.dropout_seed) / (1 - p.dropout_p)
        out = out.index_copy(0, rows, (weights.to(dtype) @ v.repeat_interleave(groups, 0)).transpose(0, 1))
        lse = lse.index_copy(1, rows, scores.to(wide).logsumexp(-1).masked_fill(none[..., 0], -torch.inf))
    return out, lse


def _sequence_rows(offsets: Tensor, used: Tensor | None, index: Tensor | None, b: int) -> Tensor:
    first = int(offsets[b])
    end = int(offsets[b + 1]) if used is None else first + int(used[b])
    slots = torch.arange(first, end, device=offsets.device)
    return slots if index is None else index[slots].long()


def results(run: Run, problem: Problem, *, backward: bool = True, seed: int = 1) -> dict[str, Tensor]:
    """Out and lse, and with ``backward`` the gradient of every differentiable input under random cotangents."""
    given = {name: t for name in DIFFERENTIABLE if (t := getattr(problem, name)) is not None}
    leaves = {name: t.detach().clone().requires_grad_(backward) for name, t in given.items()}
    out, lse = run(problem.replace(**leaves))
    found = {"out": out.detach(), "lse": lse.detach()}
    if backward:
        g = torch.Generator().manual_seed(seed)
        cotangents = [torch.randn(t.shape, generator=g).to(problem.query.dtype).to(t) for t in (out, lse)]
        grads = torch.autograd.grad((out, lse), tuple(leaves.values()), cotangents)
        found |= {f"grad_{name}": grad for name, grad in zip(leaves, grads, strict=True)}
    return found


def in_float64(problem: Problem) -> Problem:
    """The same problem with its rounded inputs in float64."""
    wider = {n: t.double() for n in DIFFERENTIABLE if (t := getattr(problem, n)) is not None}
    return problem.replace(**wider)


def run_reference(problem: Problem) -> tuple[Tensor, Tensor]:
    """The oracle as a ``run``."""
    return attention_reference(problem)


def expectations(problem: Problem, *, backward: bool = True) -> Expected:
    """The float64 reference's results and plain PyTorch's, for :func:`check_budget`."""
    oracle = results(run_reference, in_float64(problem), backward=backward)
    return oracle, results(eager_attention, problem, backward=backward)


def check_budget(run: Run, problem: Problem, *, backward: bool = True, expected: Expected | None = None) -> None:
    """Every result inside the error budget of :mod:`fastxattn.testing.budget`, against the float64 reference.

    ``expected`` saves computing the expectations again for another backend or instruction set.
    """
    for report in reports(run, problem, backward=backward, expected=expected):
        if not report.ok:
            raise AssertionError(str(report))


def reports(
    run: Run, problem: Problem, *, backward: bool = True, expected: Expected | None = None
) -> list[ErrorReport]:
    """The error of every result, for :func:`check_budget`."""
    actual_results = results(run, problem, backward=backward)
    oracle, eager = expected or expectations(problem, backward=backward)
    assert actual_results["out"].dtype == problem.query.dtype
    found = []
    for name, actual in actual_results.items():
        if name.startswith("grad_"):
            assert actual.dtype == getattr(problem, name[5:]).dtype, f"{name} is {actual.dtype}"
        found.append(measure_error(name, actual, oracle[name], eager[name], backward=name.startswith("grad_")))
    return found


def check_budget_of_several(run: Run, problems: Iterable[Problem]) -> None:
    """As :func:`check_budget`, over problems of one kind; see :func:`fastxattn.testing.budget.assert_together`."""
    assert_together(reports(run, problem) for problem in problems)


def rows_in_use(problem: Problem) -> tuple[Tensor, Tensor]:
    """Boolean masks over query rows and over key rows: the rows that any slot in use stands for, and sees or is seen.

    A query row counts when it sees a key; a key row when a query sees it.
    """
    p = problem
    seen_q = torch.zeros(p.query.shape[0], dtype=torch.bool, device=p.query.device)
    seen_k = torch.zeros(p.key.shape[0], dtype=torch.bool, device=p.query.device)
    for b in range(p.cu_seqlens_q.shape[0] - 1):
        rows = _sequence_rows(p.cu_seqlens_q, p.seqused_q, p.query_index, b)
        keys = _sequence_rows(p.cu_seqlens_k, p.seqused_k, p.key_index, b)
        slot = torch.arange(len(keys), device=rows.device)
        visible = torch.ones(len(rows), len(keys), dtype=torch.bool, device=rows.device)
        if p.kv_range is not None:
            visible = (slot >= p.kv_range[rows, :1]) & (slot < p.kv_range[rows, 1:])
        seen_q[rows] |= visible.any(1)
        seen_k[keys] |= visible.any(0)
    return seen_q, seen_k


def check_unseen(run: Run, problem: Problem, junk: float = float("nan"), *, backward: bool = True) -> None:
    """Rows nobody sees may hold anything: nothing of it reaches a result, and their gradients are 0.

    Sums may be taken in another order where a panel holds NaN: equal up to a few units in the last place.
    """
    seen_q, seen_k = rows_in_use(problem)
    clean = results(run, problem, backward=backward)
    dirty = {}
    for name, seen in (("query", seen_q), ("key", seen_k), ("value", seen_k), ("key_bias", seen_k)):
        t = getattr(problem, name)
        if t is not None:
            dirty[name] = torch.where(seen.reshape(-1, *(1,) * (t.ndim - 1)), t, junk)
    soiled = results(run, problem.replace(**dirty), backward=backward)
    for name, t in soiled.items():
        kept = clean[name][clean[name].isfinite()]
        slack = 8 * torch.finfo(t.dtype).eps * float(kept.abs().max()) if kept.numel() else 0.0
        where = f"{name} depends on rows that nobody sees"
        torch.testing.assert_close(t, clean[name], rtol=0, atol=slack, msg=where)
    assert not clean["out"][~seen_q].any()
    assert (clean["lse"][:, ~seen_q] == -torch.inf).all()
    for name, seen in (("query", seen_q), ("key", seen_k), ("value", seen_k), ("key_bias", seen_k)):
        if f"grad_{name}" in clean:
            assert not clean[f"grad_{name}"][~seen].any(), f"grad_{name} is not 0 in rows that nobody sees"


def check_repeatable(run: Run, problem: Problem, *, backward: bool = True) -> None:
    """The same call twice gives the same bits."""
    first = results(run, problem, backward=backward)
    for name, t in results(run, problem, backward=backward).items():
        assert torch.equal(t, first[name]), f"{name} differs between two calls"


def check_neighbours(run: Run, problem: Problem, *, backward: bool = True) -> None:
    """Each sequence alone gives the bits it gives in the batch. For packed problems without indices or dropout."""
    whole = results(run, problem, backward=backward)
    g = torch.Generator().manual_seed(1)
    shapes = (whole["out"].shape, whole["lse"].shape)
    d_out, d_lse = (torch.randn(s, generator=g).to(problem.query.dtype) for s in shapes)
    offsets_q, offsets_k = problem.cu_seqlens_q.tolist(), problem.cu_seqlens_k.tolist()
    bounds = zip(offsets_q, offsets_q[1:], offsets_k, offsets_k[1:], strict=False)
    for b, (q0, q1, k0, k1) in enumerate(bounds):
        parts = {
            n: getattr(problem, n)[q0:q1].clone() for n in ("query", "kv_range") if getattr(problem, n) is not None
        }
        parts |= {n: t[k0:k1].clone() for n in ("key", "value", "key_bias") if (t := getattr(problem, n)) is not None}
        for name in DIFFERENTIABLE:
            if name in parts:
                parts[name].requires_grad_(backward)
        offsets = {
            "cu_seqlens_q": torch.tensor([0, q1 - q0], dtype=torch.int32, device=problem.query.device),
            "cu_seqlens_k": torch.tensor([0, k1 - k0], dtype=torch.int32, device=problem.query.device),
        }
        out, lse = run(problem.replace(**parts, **offsets))
        assert torch.equal(out, whole["out"][q0:q1]), f"out of sequence {b} depends on its neighbours"
        assert torch.equal(lse, whole["lse"][:, q0:q1]), f"lse of sequence {b} depends on its neighbours"
        if backward:
            leaves = [n for n in DIFFERENTIABLE if n in parts]
            cotangents = (d_out[q0:q1].to(out), d_lse[:, q0:q1].to(lse))
            grads = torch.autograd.grad((out, lse), [parts[n] for n in leaves], cotangents)
            for name, grad in zip(leaves, grads, strict=True):
                rows = slice(q0, q1) if name == "query" else slice(k0, k1)
                assert torch.equal(grad, whole[f"grad_{name}"][rows]), (
                    f"grad_{name} of sequence {b} depends on neighbours"
                )
