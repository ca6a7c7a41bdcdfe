"""Differentiable collectives over rows that need not be spread evenly."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

Group = Any
"""A ``torch.distributed`` process group; None is the default one."""


def world_size(group: Group) -> int:
    """How many ranks take part: 1 when torch.distributed is not initialised."""
    return dist.get_world_size(group) if dist.is_available() and dist.is_initialized() else 1


def guarded(what: str, group: Group, run: Callable[[], Any]) -> Any:
    """Run a collective; when it fails, say which and where, and what usually made it fail."""
    try:
        return run()
    except RuntimeError as error:
        raise RuntimeError(
            f"fastxattn.distributed: {what} failed on rank {dist.get_rank(group)} of {dist.get_world_size(group)}: "
            f"another rank left, died, or did not reach this call within the process group's timeout ({error})"
        ) from error


def row_counts(rows: int, device: torch.device, group: Group) -> list[int]:
    """Every rank's number of rows. This is the one value that has to reach the host."""
    mine = torch.tensor([rows], dtype=torch.int64, device=device)
    every = [torch.empty_like(mine) for _ in range(world_size(group))]
    guarded("gathering row counts", group, lambda: dist.all_gather(every, mine, group=group))
    return [int(count) for count in torch.cat(every).tolist()]


def total_count(flags: torch.Tensor, group: Group) -> torch.Tensor:
    """How many entries are true over all ranks, as a tensor."""
    total = flags.sum()
    guarded("counting rows", group, lambda: dist.all_reduce(total, group=group))
    return total


def gather_rows(x: torch.Tensor, counts: list[int], group: Group) -> torch.Tensor:
    """All ranks' rows in order of rank, without gradient."""
    most = max(counts)
    padded = x.detach().new_zeros((most, *x.shape[1:]))
    padded[: x.shape[0]] = x.detach()
    every = [torch.empty_like(padded) for _ in counts]
    guarded("gathering features", group, lambda: dist.all_gather(every, padded, group=group))
    return torch.cat([part[:count] for part, count in zip(every, counts, strict=True)])


class GatherRows(torch.autograd.Function):
    """All ranks' rows; each rank's gradient is the sum of what all ranks computed for its rows."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, counts: list[int], group: Group) -> torch.Tensor:
        """``counts`` as :func:`row_counts` gives them."""
        ctx.counts, ctx.group, ctx.dtype = counts, group, x.dtype
        return gather_rows(x, counts, group)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        """Summed in float32, so that a bfloat16 gradient is rounded once."""
        total = grad.float().contiguous()
        guarded("summing gradients", ctx.group, lambda: dist.all_reduce(total, group=ctx.group))
        rank = dist.get_rank(ctx.group)
        first = sum(ctx.counts[:rank])
        return total[first : first + ctx.counts[rank]].to(ctx.dtype), None, None


class GlobalSum(torch.autograd.Function):
    """The sum over ranks of each rank's share of a loss; its gradient is W, which DDP's mean over ranks undoes."""

    @staticmethod
    def forward(ctx: Any, share: torch.Tensor, group: Group) -> torch.Tensor:
        """``share`` is this rank's part of the global loss."""
        ctx.world = world_size(group)
        total = share.detach().clone()
        guarded("summing the loss", group, lambda: dist.all_reduce(total, group=group))
        return total

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        """Each rank differentiates its own share."""
        return grad * ctx.world, None


class SumForward(torch.autograd.Function):
    """The sum over ranks of a tensor; every rank goes on with the same result, so the gradient passes through."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: Group) -> torch.Tensor:
        """Returns a new tensor."""
        total = x.detach().clone().contiguous()
        guarded("summing over ranks", group, lambda: dist.all_reduce(total, group=group))
        return total

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        """Identity."""
        return grad, None


class SumBackward(torch.autograd.Function):
    """Identity on a tensor that every rank holds alike; its gradient is the sum of every rank's."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: Group) -> torch.Tensor:
        """Returns a view."""
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        """Sum over ranks."""
        total = grad.float().contiguous()
        guarded("summing gradients", ctx.group, lambda: dist.all_reduce(total, group=ctx.group))
        return total.to(grad.dtype), None


def rotate(tensors: list[torch.Tensor], counts: list[int], owner: int, group: Group) -> list[torch.Tensor]:
    """Pass ``tensors`` (rows of rank ``owner``) to the previous rank and receive the next rank's."""
    world, rank = world_size(group), dist.get_rank(group)
    to, source = (rank - 1) % world, (rank + 1) % world
    rows = counts[(owner + 1) % world]
    received = [t.new_empty((rows, *t.shape[1:])) for t in tensors]

    def run() -> None:
        operations = []
        for tag, (old, new) in enumerate(zip(tensors, received, strict=True)):
            # A rank without rows sends nothing, and nobody waits for it.
            if old.numel():
                operations.append(dist.isend(old.contiguous(), group=group, group_dst=to, tag=tag))
            if new.numel():
                operations.append(dist.irecv(new, group=group, group_src=source, tag=tag))
        for operation in operations:
            if operation is not None:
                operation.wait()

    guarded("passing features around the ring", group, run)
    return received
