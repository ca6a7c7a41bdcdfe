"""Problems of key importance and their check against float64, for the tests in and out of Triton's interpreter."""

import torch

from fastxattn.ops.attention.reference import attention_reference
from fastxattn.ops.importance import backends
from fastxattn.ops.importance.problem import Problem
from fastxattn.ops.importance.reference import importance_reference
from fastxattn.testing import measure_error, offsets

LEAVES = tuple(Problem.bits)


def make(
    dtype,
    lengths_q=(5, 0, 37, 1),
    lengths_k=(40, 33, 70, 7),
    heads=4,
    kv_heads=4,
    dim=64,
    key_bias=0,
    row_weight=0,
    kv_range=False,
    probe=False,
    key_index=False,
    lse_shift=0.0,
    device="cpu",
    seed=0,
    **numbers,
):
    """``key_bias`` and ``row_weight`` are axes, ``numbers`` fields of the problem as they are."""
    g = torch.Generator().manual_seed(seed)
    offsets_q, offsets_k = offsets(lengths_q), offsets(lengths_k)
    rows_q, rows_k = sum(lengths_q) + 2, sum(lengths_k) + 3
    extra = {}
    if key_bias:
        extra["key_bias"] = torch.randn(*((rows_k,) if key_bias == 1 else (rows_k, heads)), generator=g)
    if row_weight:
        extra["row_weight"] = torch.randn(*((rows_q,) if row_weight == 1 else (heads, rows_q)), generator=g)
    if kv_range:
        start = torch.randint(-5, 30, (rows_q,), generator=g)
        places = torch.stack([start, start + torch.randint(-5, 40, (rows_q,), generator=g)], 1)
        keys = torch.repeat_interleave(torch.tensor(lengths_k), torch.tensor(lengths_q))
        keys = torch.cat([keys, torch.zeros(2, dtype=torch.long)])  # rows that belong to nobody
        extra["kv_range"] = places.clamp(min=0).minimum(keys[:, None]).sort(1).values.int()
    if key_index:
        extra["key_index"] = torch.randint(0, rows_k, (int(offsets_k[-1]),), generator=g).int()
    query = torch.randn(rows_q, heads, dim, generator=g).to(dtype)
    key = torch.randn(rows_k, kv_heads, dim, generator=g).to(dtype)
    sides = {"query": query, "key": key, "cu_seqlens_q": offsets_q, "cu_seqlens_k": offsets_k}
    problem = Problem(lse=None, **sides, **{"scale": dim**-0.5} | numbers, **extra)
    _, lse = attention_reference(in_float64(problem).attention())
    if probe:  # the last query of each sequence that has one
        last = offsets_q[1:] - 1
        there = torch.tensor(lengths_q) > 0
        problem = problem.replace(
            query_index=last[there].contiguous(),
            cu_seqlens_q=torch.cat([torch.zeros(1), there.cumsum(0)]).int(),
        )
    problem = problem.replace(lse=(lse + lse_shift).float())
    return problem.replace(**{n: t.to(device) for n in problem.tensors if (t := getattr(problem, n)) is not None})


def in_float64(problem):
    """The same rounded inputs in float64."""
    return problem.replace(**{n: t.double() for n in LEAVES if (t := getattr(problem, n)) is not None})


def results(fn, problem, *, backward=True):
    leaves = {n: t.detach().clone().requires_grad_(backward) for n in LEAVES if (t := getattr(problem, n)) is not None}
    score = fn(problem.replace(**leaves))
    found = {"score": score.detach()}
    if backward:
        g = torch.randn(score.shape, generator=torch.Generator().manual_seed(3)).to(score)
        grads = torch.autograd.grad(score, tuple(leaves.values()), g)
        found |= {f"grad_{name}": grad for name, grad in zip(leaves, grads, strict=True)}
    return found


def reports(backend, problem, *, backward=True):
    """Every result's errors beside its budget."""
    found = results(lambda p: backends.run(p, backend), problem, backward=backward)
    oracle = results(importance_reference, in_float64(problem), backward=backward)
    dtype = problem.query.dtype
    eager = results(lambda p: importance_reference(p, matmul_dtype=dtype), problem, backward=backward)
    return [measure_error(n, value, oracle[n], eager[n], backward=n != "score") for n, value in found.items()]


def check(backend, problem, *, backward=True):
    for report in reports(backend, problem, backward=backward):
        assert report.ok, str(report)
