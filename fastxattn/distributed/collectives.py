"""Differentiable collectives over rows that need not be spread evenly."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from fastxattn.ops.contrastive.reference import wide

Group = Any
"""A ``torch.distributed`` process group; None is the default one."""


def world_size(group: Group) -> int:
    """How many ranks take part: 1 when torch.distributed is not initialised."""
    if not (dist.is_available() and dist.is_initialized()):
        return 1
    size = dist.get_world_size(group)
    if size < 1:
        raise ValueError(f"group must contain the calling rank; rank {dist.get_rank()} is not in it")
    return size


def guarded(what: str, group: Group, run: Callable[[], Any]) -> Any:
    """Run a collective; when it fails, say which and where, and what usually made it fail."""
    try:
        return run()
    except RuntimeError as error:
        raise RuntimeError(
            f"fastxattn.distributed: {what} failed on rank {dist.get_rank(group)} of {dist.get_world_size(group)}: "
            f"another rank left, died, or did not reach this call within the process group's timeout ({error})"
        ) from error


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
    """All ranks' rows of some tensors, beside the tensors themselves, as one node of the graph.

    One node, because its backward pass is a collective: it runs on every rank that asks for the gradient of any of
    the tensors, whichever these are. The gradient of a rank's rows is its own plus the sum of what all ranks computed.
    """

    @staticmethod
    def forward(
        counts: list[int], group: Group, gathered: list[int], wanted: list[int], *tensors: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        """The tensors, then all ranks' rows of those at the positions ``gathered``; the fourth argument holds the
        positions whose gradients any rank needs.
        """
        return (*(t.view_as(t) for t in tensors), *(gather_rows(tensors[i], counts, group) for i in gathered))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        """Only sizes are kept."""
        ctx.counts, ctx.group, ctx.gathered, ctx.wanted, *tensors = inputs
        ctx.dtypes = [t.dtype for t in tensors]

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        """Summed in float32 or wider, so that a bfloat16 gradient is rounded once."""
        own, everyone = list(grads[: len(ctx.dtypes)]), dict(zip(ctx.gathered, grads[len(ctx.dtypes) :], strict=True))
        wanted = [i for i in ctx.gathered if i in ctx.wanted]
        if wanted:
            rows = ScatterSum.apply(torch.cat([wide(everyone[i]) for i in wanted], 1), ctx.counts, ctx.group)
            for i, part in zip(wanted, rows.chunk(len(wanted), 1), strict=True):
                own[i] = wide(own[i]) + part
        return None, None, None, None, *(g.to(dtype) for g, dtype in zip(own, ctx.dtypes, strict=True))


class ScatterSum(torch.autograd.Function):
    """The sum over ranks, of which each rank keeps its own rows: the adjoint of gathering rows."""

    @staticmethod
    def forward(x: torch.Tensor, counts: list[int], group: Group) -> torch.Tensor:
        """``x`` has all ranks' rows."""
        total = x.detach().clone(memory_format=torch.contiguous_format)
        guarded("summing gradients", group, lambda: dist.all_reduce(total, group=group))
        rank = dist.get_rank(group)
        first = sum(counts[:rank])
        return total[first : first + counts[rank]].clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        """Only sizes are kept."""
        _, ctx.counts, ctx.group = inputs

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        """Gather."""
        _, everyone = GatherRows.apply(ctx.counts, ctx.group, [0], [0], grad)
        return everyone, None, None


class GlobalSum(torch.autograd.Function):
    """The sum over ranks of each rank's share of a loss; its gradient is W, which DDP's mean over ranks undoes."""

    @staticmethod
    def forward(share: torch.Tensor, group: Group) -> torch.Tensor:
        """``share`` is this rank's part of the global loss."""
        total = share.detach().clone()
        guarded("summing the loss", group, lambda: dist.all_reduce(total, group=group))
        return total

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        """Only the number of ranks is kept."""
        ctx.world = world_size(inputs[1])

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        """Each rank differentiates its own share."""
        return grad * ctx.world, None


class SumForward(torch.autograd.Function):
    """The sum over ranks of a tensor; every rank goes on with the same result, so the gradient passes through."""

    @staticmethod
    def forward(x: torch.Tensor, group: Group) -> torch.Tensor:
        """Returns a new tensor."""
        total = x.detach().clone(memory_format=torch.contiguous_format)
        guarded("summing over ranks", group, lambda: dist.all_reduce(total, group=group))
        return total

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        """Nothing is kept."""

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        """Identity."""
        return grad, None


class SumBackward(torch.autograd.Function):
    """Identity; the gradient of the first tensor, which every rank holds alike, is the sum of every rank's.

    The other tensors only pass through, so that the collective runs whichever gradient a rank asks for.
    """

    @staticmethod
    def forward(group: Group, wanted: bool, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return views; the flag is true when any rank needs the first tensor's gradient."""
        return tuple(t.view_as(t) for t in tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        """No tensor is kept."""
        ctx.group, ctx.wanted, *_ = inputs

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor, *others: torch.Tensor) -> tuple[Any, ...]:
        """Sum over ranks, in float32 or wider."""
        if ctx.wanted:
            grad = SumForward.apply(wide(grad), ctx.group).to(grad.dtype)
        return None, None, grad, *others


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
