r"""Operators of key importance: schema, fake and gradient.

``score`` is (heads, slots_k) float32, 0 at slots that are out of use; slots are entries of ``key_index``, or key rows.

With a gradient g of the score, d loss / d s_hij = w_hi g_hj p_hij: what attention's backward computes for values g,
output gradient w and delta = 0. So the gradient is made of attention's operators, and no map exists here either::

    grad query, key = attention_backward(value = g, grad_out = w, delta = 0)
    grad key_bias_j = sum_h g_hj score_hj
    r_hi = sum_j g_hj p_hij = attention(value = g)           grad row_weight = r        grad lse = -w r

Heads that share a key have gradients of their own, so values get one column per head of the group, and the output
gradient of a head is zero but in its own column. In 16-bit dtypes g and w are each split into two numbers that add up
to them, one column per product: rounding them would cost more than everything else.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from fastxattn.ops.attention import operator as attention
from fastxattn.ops.attention.problem import Problem as AttentionProblem
from fastxattn.ops.importance.checks import check_shapes
from fastxattn.ops.importance.problem import Problem
from fastxattn.runtime.operators import KernelFunction, define, differentiable, first_order, run

_MAX_VALUE_DIM = 256


def _fake(*arguments: Any) -> Tensor:
    problem = Problem.of(arguments)
    check_shapes(problem)
    return problem.query.new_empty(problem.query.shape[1], problem.slots_k, dtype=torch.float32)


for _backend in ("cpu", "triton"):
    define(f"importance_{_backend}", f"({Problem.schema()}) -> Tensor", _fake)

FORWARD = {name: getattr(torch.ops.fastxattn, f"importance_{name}").default for name in ("cpu", "triton")}


class Importance(KernelFunction):
    """score = Importance.apply(backend, *problem.values())."""

    @staticmethod
    def forward(backend: str, *arguments: Any) -> Tensor:
        """Run the backend's operator."""
        score: Tensor = run(FORWARD[backend], *arguments)
        return score

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Save the problem and the score."""
        ctx.backend, *arguments = inputs
        Problem.of(arguments).save(ctx, output)

    @staticmethod
    @first_order("key_importance")
    def backward(ctx: Any, saved: tuple[Any, ...], grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of query, key, lse, key_bias and row_weight."""
        problem, (score,) = Problem.restore(ctx, saved)
        needs = Problem.needs(ctx.needs_input_grad[1:])
        needed = {name for name, bit in Problem.bits.items() if needs & bit}
        grads: dict[str, Tensor] = {}
        if "key_bias" in needed:
            grads["key_bias"] = _by_row(problem, _like_bias(problem, (grad * score).T), problem.key_bias)
        gathered = _gather_keys(problem)
        if needed & {"query", "key"}:
            grads["query"], grad_key = _grad_tokens(ctx.backend, gathered, grad, needed)
            if "key" in needed:
                if grad_key.shape[1] != problem.key.shape[1]:  # of heads that no longer share a key
                    grad_key = grad_key.unflatten(1, (problem.key.shape[1], -1)).sum(2)
                grads["key"] = _by_row(problem, grad_key, problem.key)
        if needed & {"lse", "row_weight"}:
            received = _weighted_rows(ctx.backend, gathered, grad)  # (heads, rows_q)
            weight = problem.row_weight
            grads["lse"] = -received if weight is None else -received * weight
            if weight is not None:
                grads["row_weight"] = received if weight.ndim == 2 else received.sum(0)
        return None, *Problem.routed([grads.get(name) for name in Problem.bits], needs)


def _gather_keys(problem: Problem) -> Problem:
    """The same problem without key_index and without shared heads when values would need too many columns."""
    key, key_bias, index = problem.key, problem.key_bias, problem.key_index
    if index is not None:
        rows = index.long().clamp(0, max(key.shape[0] - 1, 0))
        key, key_bias = key[rows], None if key_bias is None else key_bias[rows]
    group = problem.query.shape[1] // key.shape[1]
    if 3 * group > _MAX_VALUE_DIM:
        key = key.repeat_interleave(group, 1)
    return problem.replace(key=key, key_bias=key_bias, key_index=None)


def _by_row(problem: Problem, by_slot: Tensor, like: Tensor | None) -> Tensor:
    """Sums of slots at the rows they stand for."""
    assert like is not None
    if problem.key_index is None:
        return by_slot.to(like.dtype)
    rows = problem.key_index.long().clamp(0, max(like.shape[0] - 1, 0))
    return torch.zeros_like(like, memory_format=torch.contiguous_format).index_add_(0, rows, by_slot.to(like.dtype))


def _like_bias(problem: Problem, by_head: Tensor) -> Tensor:
    assert problem.key_bias is not None
    return by_head if problem.key_bias.ndim == 2 else by_head.sum(1)


def _split(x: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """Numbers of ``dtype`` that add up to x, largest first."""
    if dtype == x.dtype:
        return [x]
    high = x.to(dtype)
    return [high, (x - high.to(x.dtype)).to(dtype)]


def _columns(problem: Problem, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Value (slots_k, kv_heads, columns) and grad_out (rows_q, heads, columns) whose product is w g."""
    query, weight = problem.query, problem.row_weight
    heads, kv_heads = query.shape[1], problem.key.shape[1]
    gs = _split(grad, query.dtype)
    ws = (
        [query.new_ones(1, 1)]
        if weight is None
        else [w if w.ndim == 2 else w[None] for w in _split(weight, query.dtype)]
    )
    pairs = [(w, g) for i, w in enumerate(ws) for j, g in enumerate(gs) if i + j < 2]  # low * low is below rounding
    value = torch.stack([g for _, g in pairs], 2)  # (heads, slots, parts)
    # (slots, kv_heads, group * parts); view and reshape, which is_grads_batched=True knows
    value = value.view(kv_heads, heads // kv_heads, *value.shape[1:]).permute(2, 0, 1, 3)
    value = value.reshape(value.shape[0], kv_heads, -1)
    rows = torch.stack([w.expand(heads, query.shape[0]) for w, _ in pairs], 2).transpose(0, 1)  # (rows, heads, parts)
    own = torch.eye(heads // kv_heads, dtype=query.dtype, device=query.device).repeat(kv_heads, 1)  # (heads, group)
    return value.contiguous(), (own[None, :, :, None] * rows[:, :, None, :]).flatten(2)


def _grad_tokens(backend: str, problem: Problem, grad: Tensor, needed: set[str]) -> tuple[Tensor, Tensor]:
    """Gradients of query and, by slot, of key in its own heads."""
    value, grad_out = _columns(problem, grad)
    needs = sum(AttentionProblem.bits[name] for name in ("query", "key") if name in needed)
    lse, given = problem.lse, problem.attention(value).values()
    grad_lse = None
    if problem.query.dtype == lse.dtype:
        # float32 attention divides weights by what they add up to and sums delta itself: the first is undone by the
        # ratio of both normalisers, the second by a gradient of lse that is delta.
        out, total = attention.FORWARD[backend](*given)
        grad_out = grad_out * _ratio(total, lse).T[:, :, None]
        grad_lse, lse = (out * grad_out).sum(2).T.contiguous(), total
    else:
        out = torch.zeros(grad_out.shape, dtype=grad_out.dtype, device=grad_out.device)
        lse = lse.double() if backend == "cpu" else lse
    grad_query, grad_key, *_ = attention.BACKWARD[backend](grad_out, grad_lse, out, lse, *given, needs)
    return grad_query, grad_key


def _weighted_rows(backend: str, problem: Problem, grad: Tensor) -> Tensor:
    """r_hi = sum_j g_hj exp(s_hij - lse_hi), (heads, rows_q) float32.

    In float32 that is attention over the values g. In 16 bits its output would be rounded too far: there, with log g
    added to the scores, attention's log-sum-exp is the log of the sum; once for positive g, once for negative.
    """
    lse, forward = problem.lse, attention.FORWARD[backend]
    if problem.query.dtype == lse.dtype:
        value, own = _columns(problem.replace(row_weight=None), grad)
        out, total = forward(*problem.attention(value).values())
        return (out * own).sum(2).T * _ratio(total, lse)
    given = problem.key_bias
    bias = lse.new_zeros(()) if given is None else given if given.ndim == 2 else given[:, None]
    value = problem.key[:, :, :1].contiguous()  # any will do
    received = torch.zeros_like(lse)
    for sign in (1, -1):
        part = problem.replace(key_bias=((sign * grad).clamp(min=0).log().T + bias).contiguous())
        received += sign * _ratio(forward(*part.attention(value).values())[1], lse)
    return received


def _ratio(total: Tensor, lse: Tensor) -> Tensor:
    """Exp(total - lse), 0 where either is -inf."""
    return torch.where((total == -torch.inf) | (lse == -torch.inf), 0.0, torch.exp(total - lse)).to(lse.dtype)


for _backend in FORWARD:
    differentiable(f"importance_{_backend}", functools.partial(Importance.apply, _backend))
