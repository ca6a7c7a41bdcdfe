"""Ring exchange: every rank holds its own rows and one visiting block; gradients travel home with the block."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fastxattn.distributed.collectives import Group, rotate, world_size
from fastxattn.ops.contrastive.backends import INFONCE
from fastxattn.ops.contrastive.fused import dense_ids, positives, row_losses
from fastxattn.ops.contrastive.operator import GRADS, operator
from fastxattn.ops.contrastive.problem import Pairs, Problem, Sigmoid, Slopes, Statistics
from fastxattn.runtime.backend import resolve
from fastxattn.runtime.operators import KernelFunction, first_order

ALL = 7
"""What ``needs`` asks for: the gradients of both features and of the scale."""


def fused_backend(problem: Problem, requested: str) -> str:
    """The kernels that run every block, or the reason why none does."""
    name = resolve("distributed ring", INFONCE, problem, requested)
    if name == "reference":
        where = f"{problem.a.dtype} features on {problem.a.device}"
        raise RuntimeError(
            f"strategy='ring' runs on fused backends only, and for {where} the backend is the reference; use "
            "strategy='gather'"
        )
    return name


def _pairs(
    sides: tuple[Tensor, Tensor],
    scale: Tensor,
    bias: Tensor | None,
    own: bool,
    backend: str,
    ids: tuple[Tensor, Tensor] | None,
) -> Pairs:
    """The matrix of one block; without ids positives lie on the diagonal of a rank's own block only."""
    a, b = sides
    if ids is not None:
        id_a, id_b = dense_ids(*ids)  # numbered anew for every block: only equality counts
    else:
        id_b = torch.arange(b.shape[0], dtype=torch.int32, device=a.device)
        id_a = id_b if own else torch.full((a.shape[0],), -1, dtype=torch.int32, device=a.device)
    pairs = Pairs(a=a, b=b, scale=scale, bias=bias, id_a=id_a, id_b=id_b)
    if ids is None and own and a.shape[0]:
        return pairs.replace(exact=positives(pairs, backend, blocked=False))
    return pairs


def _merged(x: Tensor, y: Tensor) -> Tensor:
    """Statistics of the same rows over two sets of columns, as one (see contrastive.operator.STATS)."""
    negative, positive = x[4] + y[4], x[5] + y[5]

    def mean(plane: int, count: int, total: Tensor) -> Tensor:
        return (x[plane] * x[count] + y[plane] * y[count]) / total.clamp(min=1)

    def lse_pos(s: Tensor) -> Tensor:
        return torch.where(s[5] > 0, s[2] + s[3], -torch.inf)

    mean_pos = mean(2, 5, positive)
    excess = (torch.logaddexp(lse_pos(x), lse_pos(y)) - mean_pos).clamp(min=0)
    excess = torch.where(positive > 1, excess, 0.0)
    lse = torch.logaddexp(x[0], y[0])
    return torch.stack([lse, mean(1, 4, negative), mean_pos, excess, negative, positive, x[6] + y[6]])


class RingStats(KernelFunction):
    """Each local row's statistics against every rank's columns."""

    generate_vmap_rule = False

    @staticmethod
    def forward(
        a: Tensor, b: Tensor, scale: Tensor, ids_a: Tensor | None, ids_b: Tensor | None, means: bool, *flags: Any
    ) -> Tensor:
        """One turn of the ring merges what the blocks have; ``flags`` are the counts, the group and the backend."""
        counts, group, backend = flags
        merged: Tensor | None = None
        for pairs, _ in RingStats.turn(a, [b.detach()], (ids_a, ids_b), scale, (counts, group, backend)):
            statistics = pairs.into(Statistics, columns=False, means=means)
            stats, _ = operator("contrastive_stats", backend)(*statistics.values())
            merged = stats if merged is None else _merged(merged, stats)
        assert merged is not None
        return merged

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Visiting blocks are not kept; they travel once more in the backward pass."""
        a, b, scale, ids_a, ids_b, _, *ctx.flags = inputs
        ctx.save_for_backward(a, b, scale, ids_a, ids_b, output)

    @staticmethod
    def turn(
        a: Tensor, visiting: list[Tensor], ids: tuple[Any, Any], scale: Tensor, flags: tuple[list[int], Group, str]
    ) -> Iterator[tuple[Pairs, list[Tensor]]]:
        """Each block's matrix and what travels with it; after the last one everything is passed on once more,
        home, when more than the block travels.
        """
        (ids_a, ids_b), (counts, group, backend) = ids, flags
        rank, world = dist.get_rank(group), world_size(group)
        travelling = [*visiting] if ids_b is None else [*visiting, ids_b]
        for step in range(world):
            both = None if ids_b is None else (ids_a, travelling[-1])
            yield _pairs((a, travelling[0]), scale, None, step == 0, backend, both), travelling
            if step + 1 < world or len(visiting) > 1:
                travelling[:] = rotate(travelling, counts, (rank + step) % world, group)
        visiting[:] = travelling[: len(visiting)]

    @staticmethod
    @first_order("distributed infonce_loss")
    def backward(ctx: Any, saved: tuple[Any, ...], grad: Tensor) -> tuple[Any, ...]:
        """A second turn: the visiting block's gradient grows at every stop and arrives home complete."""
        a, b, scale, ids_a, ids_b, merged = saved
        _, _, backend = ctx.flags
        grad_a = torch.zeros(a.shape, dtype=torch.float32, device=a.device)
        dots = torch.zeros((), dtype=torch.float64, device=a.device)
        visiting = [b.detach(), torch.zeros(b.shape, dtype=torch.float32, device=b.device)]
        for pairs, travelling in RingStats.turn(a, visiting, (ids_a, ids_b), scale, ctx.flags):
            columns = torch.zeros((merged.shape[0], travelling[0].shape[0]), dtype=torch.float32, device=a.device)
            grads = grad[:GRADS].contiguous(), columns[:GRADS].contiguous()
            slopes = pairs.into(Slopes, columns=False)
            part_a, part_b, dot = operator("contrastive_backward", backend)(
                *grads, merged, columns, *slopes.values(), ALL
            )
            grad_a += part_a
            travelling[1] = travelling[1] + part_b
            dots += dot.sum(dtype=torch.float64)
        return grad_a.to(a.dtype), visiting[1].to(b.dtype), dots.to(scale.dtype), *[None] * 6


class RingSigmoid(KernelFunction):
    """The sum of local rows' losses against every rank's columns, with its gradients, in one turn of the ring."""

    generate_vmap_rule = False

    @staticmethod
    def forward(
        a: Tensor,
        b: Tensor,
        scale: Tensor,
        bias: Tensor,
        ids_a: Tensor | None,
        ids_b: Tensor | None,
        counts: list[int],
        group: Group,
        backend: str,
    ) -> tuple[Tensor, ...]:
        """The sum, and its gradients for a, b, scale and bias, which the backward pass only multiplies."""
        rank, world = dist.get_rank(group), world_size(group)
        grad_a = torch.zeros(a.shape, dtype=torch.float32, device=a.device)
        total = torch.zeros((), dtype=torch.float64, device=a.device)
        block, grad_block = b.detach(), torch.zeros(b.shape, dtype=torch.float32, device=b.device)
        dots, slopes = torch.zeros_like(total), torch.zeros_like(total)
        travelling = [] if ids_b is None else [ids_b]
        for step in range(world):
            owner = (rank + step) % world
            ids = None if ids_a is None else (ids_a, travelling[0])
            pairs = _pairs((a, block), scale, bias, step == 0, backend, ids).into(Sigmoid)
            loss, part_a, part_b, dot, row_dz = operator("sigmoid", backend)(*pairs.values(), ALL)
            total += loss.sum(dtype=torch.float64)
            dots += dot.sum(dtype=torch.float64)
            slopes += row_dz.sum(dtype=torch.float64)
            grad_a += part_a
            grad_block += part_b
            block, grad_block, *travelling = rotate([block, grad_block, *travelling], counts, owner, group)
        return total.float(), grad_a, grad_block, dots, slopes

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Gradients are outputs of the forward pass, not differentiable themselves."""
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(*inputs[:4], *output[1:])

    @staticmethod
    @first_order("distributed sigmoid_loss")
    def backward(ctx: Any, saved: tuple[Any, ...], grad: Tensor, *_: Any) -> tuple[Any, ...]:
        """Scale what the forward pass left. Every rank must pass the same ``grad``."""
        grads = ((g * grad).to(t.dtype) for t, g in zip(saved[:4], saved[4:], strict=True))
        return (*grads, *[None] * 5)


def infonce_rows(
    p: Problem, ids: tuple[Tensor, Tensor] | None, counts: list[int], group: Group, backend: str
) -> tuple[Tensor, Tensor]:
    """Each of this rank's rows' loss, (n,) float32, and whether the row has a positive anywhere."""
    stats: Tensor = RingStats.apply(
        p.a, p.b, p.scale, *(ids or (None, None)), p.label_smoothing > 0, counts, group, backend
    )
    return row_losses(stats, p, [])


def sigmoid_total(
    p: Problem, ids: tuple[Tensor, Tensor] | None, counts: list[int], group: Group, backend: str
) -> Tensor:
    """The sum of this rank's rows' losses."""
    total: Tensor
    total, *_ = RingSigmoid.apply(p.a, p.b, p.scale, p.bias, *(ids or (None, None)), counts, group, backend)
    return total
