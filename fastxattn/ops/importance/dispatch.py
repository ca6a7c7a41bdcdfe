"""From arguments to a backend."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from fastxattn.ops.attention import checks as attention_checks
from fastxattn.ops.attention.dispatch import fits, prepare, short_way, sound_numbers
from fastxattn.ops.importance import checks, cpu, triton
from fastxattn.ops.importance.autograd import FORWARD, Importance
from fastxattn.ops.importance.problem import ImportanceProblem
from fastxattn.ops.importance.reference import importance_reference
from fastxattn.ops.offsets import readable
from fastxattn.runtime.backend import Backend, resolve
from fastxattn.runtime.operators import needs_function, plain

BACKENDS = (
    Backend("cpu", cpu.supports),
    Backend("triton", triton.supports),
    Backend("reference", lambda problem: None),
)


def score_of(problem: ImportanceProblem, scale: float | None, backend: str) -> Tensor:
    """Score (heads, slots_k) of a problem whose ``scale`` is yet to be filled in."""
    if short_way(backend):
        # As attention's short way: the operator checks everything it relies on, and Python looks only when it refused.
        try:
            if problem.query.is_cpu and problem.query.dtype != torch.float64:
                given = problem.query.size(-1) ** -0.5 if scale is None else scale
                if sound_numbers(given, problem.softcap) and fits(problem.kv_range, problem.query):
                    return _run("cpu", problem._replace(scale=given))
        except (RuntimeError, TypeError, AttributeError):
            pass
    problem = _prepare(problem, scale)
    if not is_compiling():  # while tracing, the operator's fake checks
        checks.check_shapes(problem)
        if readable(problem.cu_seqlens_q):
            attention_checks.check_contents(problem.attention())
    return _run(resolve("importance", BACKENDS, problem, backend), problem)


def _run(name: str, problem: ImportanceProblem) -> Tensor:
    """Run a backend, differentiably."""
    if name == "reference":
        return importance_reference(problem)
    score: Tensor
    if needs_function(problem.query, problem.key, problem.lse, problem.key_bias, problem.row_weight):
        score = Importance.apply(name, *problem)
    else:
        score = plain(FORWARD[name], *problem)
    return score


def _prepare(problem: ImportanceProblem, scale: float | None) -> ImportanceProblem:
    """Dtypes and layouts as backends want them; what is not a tensor passes through, for the checks to name."""
    attention = prepare(*problem.attention()._replace(scale=scale))  # type: ignore[arg-type]
    shared: dict[str, Any] = {k: v for k, v in attention._asdict().items() if k in ImportanceProblem._fields}
    if isinstance(problem.lse, Tensor):
        shared["lse"] = problem.lse.contiguous()
    return problem._replace(**shared)


def count_queries(problem: ImportanceProblem) -> Tensor:
    """How many queries see each key slot, (slots_k,) int64; no sync, and no map either."""
    p, device = problem, problem.query.device
    offsets_q, offsets_k = p.cu_seqlens_q.long(), p.cu_seqlens_k.long()
    length_q = offsets_q.diff() if p.seqused_q is None else p.seqused_q.long()
    length_k = offsets_k.diff() if p.seqused_k is None else p.seqused_k.long()
    if length_q.shape[0] == 0:
        return torch.zeros(p.slots_k, dtype=torch.long, device=device)
    slot = torch.arange(p.slots_k, device=device)
    sequence = torch.searchsorted(offsets_k[1:], slot, right=True).clamp(max=length_k.shape[0] - 1)
    used = (slot >= offsets_k[sequence]) & (slot - offsets_k[sequence] < length_k[sequence])
    if p.kv_range is None:
        return torch.where(used, length_q[sequence], 0)
    # A query adds one where its range starts and takes it back where it ends; the running sum counts.
    slots_q = p.query.shape[0] if p.query_index is None else p.query_index.shape[0]
    mine = torch.arange(slots_q, device=device)
    home = torch.searchsorted(offsets_q[1:], mine, right=True).clamp(max=length_q.shape[0] - 1)
    there = mine - offsets_q[home] < length_q[home]
    rows = mine if p.query_index is None else p.query_index.long().clamp(0, max(p.query.shape[0] - 1, 0))
    start, end = p.kv_range[rows].long().unbind(1)
    start, end = start.clamp(min=0), torch.minimum(end, length_k[home])
    step = (there & (start < end)).long()
    edges = torch.zeros(p.slots_k + 1, dtype=torch.long, device=device)
    limit = p.slots_k
    edges = edges.index_add(0, (offsets_k[home] + start).clamp(0, limit), step)
    edges = edges.index_add(0, (offsets_k[home] + end).clamp(0, limit), -step)
    return torch.where(used, edges.cumsum(0)[:-1], 0)
