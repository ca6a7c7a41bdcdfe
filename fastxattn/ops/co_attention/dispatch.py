"""From arguments to a backend, and from there to one pass or to two calls of attention."""

from __future__ import annotations

import torch
from torch import Tensor

from fastxattn.ops.attention import checks as attention_checks
from fastxattn.ops.attention import dispatch as attention
from fastxattn.ops.attention.problem import Problem
from fastxattn.ops.co_attention import cpu, triton
from fastxattn.ops.co_attention.autograd import FORWARD, CoAttention
from fastxattn.ops.co_attention.problem import CoAttentionProblem
from fastxattn.ops.offsets import readable
from fastxattn.runtime.backend import Backend, preferring, resolve
from fastxattn.runtime.operators import needs_function, plain

Both = tuple[Problem, Problem]


def _both(one: Backend) -> Backend:
    def supports(directions: object) -> str | None:
        assert isinstance(directions, tuple)
        return next((reason for d in directions if (reason := one.supports(d)) is not None), None)

    return Backend(one.name, supports)


BACKENDS = tuple(_both(b) for b in attention.BACKENDS)
ONE_PASS = {"cpu": cpu.pays, "triton": triton.pays}
"""Backends with kernels of their own, and where those are faster than two calls of attention."""


def attend(problem: CoAttentionProblem, scale: float | None, backend: str) -> tuple[Tensor, Tensor]:
    """(out_a, out_b) of a problem whose ``scale`` is yet to be filled in; its seed is (2,) or None."""
    if (found := _short(problem, scale, backend)) is not None:
        return found
    directions = _prepared(problem, scale)
    if not torch.compiler.is_compiling():  # while tracing, the operator's fake checks
        for direction in directions:
            attention_checks.check_shapes(direction)
            if readable(direction.cu_seqlens_q):
                attention_checks.check_contents(direction)
    query = directions[0].query
    order = preferring(BACKENDS, "cuda" if query.is_cuda and query.dtype == torch.float32 else None)
    name = resolve("co_attention", order, directions, backend)
    prepared = _joined(problem, *directions)
    # An exported graph keeps to attention, which other runtimes know.
    if name in ONE_PASS and not torch.compiler.is_exporting() and ONE_PASS[name](prepared):
        return one_pass(name, prepared)
    return attention.run(name, directions[0])[0], attention.run(name, directions[1])[0]


def _short(problem: CoAttentionProblem, scale: float | None, backend: str) -> tuple[Tensor, Tensor] | None:
    """The short way for plain CPU calls: the operator checks all it relies on; None sends the call the checked way."""
    if not attention.short_way(backend):
        return None
    try:
        whole = problem._replace(scale=problem.query_a.shape[2] ** -0.5 if scale is None else scale)
        if not attention.sound_numbers(whole.scale, whole.softcap, whole.dropout_p):
            return None
        return one_pass("cpu", whole) if ONE_PASS["cpu"](whole) else None
    except (RuntimeError, TypeError, AttributeError, ZeroDivisionError):
        return None


def one_pass(name: str, problem: CoAttentionProblem) -> tuple[Tensor, Tensor]:
    """Run a backend's own kernels on a problem that is known to be sound, differentiably."""
    if needs_function(*problem[:4], problem.bias_a, problem.bias_b):
        return CoAttention.apply(name, *problem)[:2]  # type: ignore[no-any-return]
    return plain(FORWARD[name], *problem)[:2]  # type: ignore[no-any-return]


def _prepared(problem: CoAttentionProblem, scale: float | None) -> Both:
    one, other = (attention.prepare(*problem.direction(i)._replace(scale=scale)) for i in (0, 1))  # type: ignore[arg-type]
    # What both directions share was prepared alike; it is the same tensor again.
    return one, other._replace(query=one.key, key=one.query)


def _joined(problem: CoAttentionProblem, one: Problem, other: Problem) -> CoAttentionProblem:
    return problem._replace(
        query_a=one.query, query_b=one.key, value_a=other.value, value_b=one.value, cu_seqlens_a=one.cu_seqlens_q,
        cu_seqlens_b=one.cu_seqlens_k, bias_a=other.key_bias, bias_b=one.key_bias, scale=one.scale,
    )  # fmt: skip
