"""Backends of the contrastive losses: which runs a problem, why not the others, and how each one runs."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from fastxattn.ops.contrastive import fused, reference
from fastxattn.ops.contrastive.operator import OPERATORS
from fastxattn.ops.contrastive.problem import Metrics, Problem
from fastxattn.runtime import reasons
from fastxattn.runtime.autocast import no_autocast
from fastxattn.runtime.backend import Backend, dispatch, preferring

Loss = Tensor | tuple[Tensor, Tensor]
"""A scalar, or with reduction ``none`` the losses of the rows, and of the columns when symmetric."""


def _infonce(backend: str, p: Problem) -> tuple[Loss, list[Metrics]]:
    losses, metrics = reference.infonce_reference(p) if backend == "reference" else fused.infonce_fused(p, backend)
    weights = (p.weight_a, p.weight_b)
    results = [_reduced(*loss, weight, p.reduction) for loss, weight in zip(losses, weights, strict=False)]
    if len(results) == 1:
        return results[0], metrics
    return ((results[0], results[1]) if p.reduction == "none" else (results[0] + results[1]) / 2), metrics


def _sigmoid(backend: str, p: Problem) -> Tensor:
    if backend == "reference":
        rows = reference.sigmoid_reference(p)
        return _reduced(rows, torch.ones_like(rows, dtype=torch.bool), p.weight_a, p.reduction)
    if p.reduction == "none":
        rows = fused.sigmoid_fused(p, None, backend)
        return rows if p.weight_a is None else rows * p.weight_a
    weight = p.weight_a
    if weight is None:
        weight = torch.ones(p.a.shape[0], dtype=torch.float32, device=p.a.device)
    if p.reduction == "mean":
        total = weight.sum()
        weight = weight / torch.where(total == 0, 1.0, total)
    return fused.sigmoid_fused(p, weight.contiguous(), backend)


def _reduced(loss: Tensor, has: Tensor, weight: Tensor | None, reduction: str) -> Tensor:
    """One direction's losses, of which rows without a positive take no part in the mean."""
    if weight is not None:
        loss = torch.where(has, loss * weight, 0.0)
    if reduction == "none":
        return loss
    total = loss.sum()
    if reduction == "sum":
        return total
    number = (has.to(loss.dtype) if weight is None else torch.where(has, weight, 0.0)).sum()
    return total / torch.where(number == 0, 1.0, number)


REASONS = {
    "cpu": lambda p: reasons.cpu(p.a, p.scale) or reasons.exported("losses"),
    "triton": lambda p: reasons.triton(p.a, p.scale) or reasons.exported("losses"),
    "cuda": lambda p: reasons.cuda(p.a, p.scale) or reasons.exported("losses"),
    "reference": lambda p: None,
}
"""Why a backend does not run a problem, in the order in which ``auto`` tries them, see :func:`in_order`."""
INFONCE = tuple(Backend(name, reason, functools.partial(_infonce, name)) for name, reason in REASONS.items())
SIGMOID = tuple(Backend(name, reason, functools.partial(_sigmoid, name)) for name, reason in REASONS.items())

for _name in OPERATORS:
    _package = "fastxattn.ops.contrastive"
    reasons.at_first_call(f"{_name}_triton", ("CUDA", "CPU"), f"{_package}.triton.launch", _name)
    reasons.at_first_call(f"{_name}_cuda", ("CUDA",), f"{_package}.kernels_cuda", _name)


def in_order(table: tuple[Backend, ...], a: Tensor) -> tuple[Backend, ...]:
    """In float32 the CUDA kernels were measured to be 3.7 to 4.6 times as fast as Triton's, in 16 bits slower."""
    return preferring(table, "cuda" if a.is_cuda and a.dtype == torch.float32 else None)


def run(op: str, table: tuple[Backend, ...], p: Problem, requested: str) -> Any:
    """The result of ``p``, in the dtypes of its features whatever autocast is."""
    with no_autocast(p.a.device):
        return dispatch(op, in_order(table, p.a), p, requested)
