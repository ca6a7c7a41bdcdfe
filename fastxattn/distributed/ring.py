"""Ring exchange: every rank holds its own rows and one visiting block; gradients travel home with the block."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

from fastxattn.distributed.collectives import Group, rotate, world_size
from fastxattn.ops.contrastive.api import BACKENDS
from fastxattn.ops.contrastive.autograd import operator
from fastxattn.ops.contrastive.problem import Problem
from fastxattn.ops.contrastive.schema import GRADS
from fastxattn.runtime import backend as choose


def _backend(a: torch.Tensor, b: torch.Tensor, scale: torch.Tensor, requested: str) -> str:
    name = choose.resolve("distributed ring", BACKENDS, Problem(a, b, scale), requested)
    if name == "reference":
        raise RuntimeError("distributed ring: runs on fused backends only; use strategy='gather' with the reference")
    return name


def _problem(a: torch.Tensor, b: torch.Tensor, scale: Any, bias: Any, own: bool, backend: str) -> tuple[Any, ...]:
    """The operators' arguments for one block: positives lie on the diagonal of a rank's own block only."""
    id_b = torch.arange(b.shape[0], dtype=torch.int32, device=a.device)
    id_a = id_b if own else torch.full((a.shape[0],), -1, dtype=torch.int32, device=a.device)
    head = (a, b, scale, bias, None, None, id_a, id_b, None, None)
    exact = operator("positive_logits", backend)(*head, None, False, False) if own and a.shape[0] else None
    return (*head, exact, False)


class RingInfoNCE(torch.autograd.Function):
    """Each local row's loss against every rank's columns."""

    @staticmethod
    def forward(
        ctx: Any, a: torch.Tensor, b: torch.Tensor, scale: torch.Tensor, counts: list[int], group: Group, backend: str
    ) -> torch.Tensor:
        """One turn of the ring merges the log-sum-exps."""
        rank, world = dist.get_rank(group), world_size(group)
        merged: torch.Tensor | None = None
        block = b.detach()
        for step in range(world):
            owner = (rank + step) % world
            problem = _problem(a, block, scale, None, step == 0, backend)
            stats, _ = operator("contrastive_stats", backend)(*problem, *[None] * 4, True, False, False)
            if merged is None:
                merged = stats
            else:
                merged[0] = torch.logaddexp(merged[0], stats[0])
            if step + 1 < world:
                (block,) = rotate([block], counts, owner, group)
        assert merged is not None
        ctx.save_for_backward(a, b, scale, merged)
        ctx.flags = (counts, group, backend)
        return F.softplus(merged[0] - merged[2], threshold=50.0)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        """A second turn: the visiting block's gradient grows at every stop and arrives home complete."""
        a, b, scale, merged = ctx.saved_tensors
        counts, group, backend = ctx.flags
        rank, world = dist.get_rank(group), world_size(group)
        share = torch.sigmoid(merged[0] - merged[2]) * grad
        grads = torch.zeros((GRADS, a.shape[0]), device=a.device)
        grads[0], grads[2] = share, -share
        grad_a = torch.zeros(a.shape, device=a.device)
        block, grad_block = b.detach(), torch.zeros(b.shape, device=b.device)
        dots = torch.zeros((), dtype=torch.float64, device=a.device)
        for step in range(world):
            owner = (rank + step) % world
            problem = _problem(a, block, scale, None, step == 0, backend)
            columns = torch.zeros((merged.shape[0], block.shape[0]), device=a.device)
            part_a, part_b, dot = operator("contrastive_backward", backend)(
                grads, columns[:GRADS].contiguous(), merged, columns, *problem, None, None, True, False, 7
            )
            grad_a += part_a
            grad_block += part_b
            dots += dot.sum(dtype=torch.float64)
            block, grad_block = rotate([block, grad_block], counts, owner, group)
        return grad_a.to(a.dtype), grad_block.to(b.dtype), dots.to(scale.dtype), None, None, None


class RingSigmoid(torch.autograd.Function):
    """The sum of local rows' losses against every rank's columns, with its gradients, in one turn of the ring."""

    @staticmethod
    def forward(
        ctx: Any,
        a: torch.Tensor,
        b: torch.Tensor,
        scale: torch.Tensor,
        bias: torch.Tensor,
        counts: list[int],
        group: Group,
        backend: str,
    ) -> torch.Tensor:
        """Nothing is left for the backward pass but a multiplication."""
        rank, world = dist.get_rank(group), world_size(group)
        grad_a, total = torch.zeros(a.shape, device=a.device), torch.zeros((), dtype=torch.float64, device=a.device)
        block, grad_block = b.detach(), torch.zeros(b.shape, device=b.device)
        dots, slopes = torch.zeros_like(total), torch.zeros_like(total)
        for step in range(world):
            owner = (rank + step) % world
            problem = _problem(a, block, scale, bias, step == 0, backend)
            loss, part_a, part_b, dot, row_dz = operator("sigmoid", backend)(*problem, None, 7)
            total += loss.sum(dtype=torch.float64)
            dots += dot.sum(dtype=torch.float64)
            slopes += row_dz.sum(dtype=torch.float64)
            grad_a += part_a
            grad_block += part_b
            block, grad_block = rotate([block, grad_block], counts, owner, group)
        ctx.save_for_backward(grad_a, grad_block, dots, slopes)
        ctx.dtype = a.dtype
        return total.float()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        """Scale what the forward pass left. Every rank must pass the same ``grad``."""
        grad_a, grad_b, dots, slopes = ctx.saved_tensors
        features = ((g * grad).to(ctx.dtype) for g in (grad_a, grad_b))
        return (*features, (dots * grad).float(), (slopes * grad).float(), None, None, None)


def infonce_rows(
    a: torch.Tensor, b: torch.Tensor, scale: torch.Tensor, counts: list[int], group: Group, backend: str
) -> torch.Tensor:
    """Each of this rank's rows' loss, (n,) float32."""
    rows: torch.Tensor = RingInfoNCE.apply(a, b, scale, counts, group, _backend(a, b, scale, backend))
    return rows


def sigmoid_total(
    a: torch.Tensor,
    b: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor,
    counts: list[int],
    group: Group,
    backend: str,
) -> torch.Tensor:
    """The sum of this rank's rows' losses."""
    total: torch.Tensor = RingSigmoid.apply(a, b, scale, bias, counts, group, _backend(a, b, scale, backend))
    return total
