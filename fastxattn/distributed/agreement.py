"""The small exchange before every distributed call: row counts, who takes part in the gradient, and what must agree.

All of it travels in one vector of fixed size and one ``all_gather``. Every rank sees every vector, so either all ranks
go on or all ranks raise the same error.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fastxattn.distributed.collectives import Group, guarded, world_size

Value = bool | int | float | str | torch.dtype
CALLS = ("infonce_loss", "multi_positive_infonce_loss", "sigmoid_loss", "context_parallel_attention")
LENGTH = 20  # entries of the vector; every call sends as many, so that calls that differ can be compared
REFUSED = 1
RECORDING = 1  # bit of the gradient field: autograd records on this rank; the next bits are the tensors that require it


@dataclass(frozen=True)
class Agreement:
    """What the exchange found.

    Every rank's number of rows, and for each tensor whether any rank needs its gradient.
    """

    counts: list[int]
    wanted: tuple[bool, ...]

    def joined(self, x: Tensor, wanted: bool | None = None) -> Tensor:
        """``x`` as a tensor that requires grad when any rank's backward pass runs collectives.

        Each rank has to take part in these, also one whose own tensors are frozen or empty.
        """
        if (any(self.wanted) if wanted is None else wanted) and not x.requires_grad:
            return x.detach().requires_grad_()
        return x


def encoded(value: Value) -> int:
    """``value`` as an int64 that is equal on two ranks when the values are."""
    if isinstance(value, torch.dtype):
        value = str(value).removeprefix("torch.")
    if isinstance(value, str):
        return int.from_bytes(value.encode()[:8].ljust(8), "big")
    if isinstance(value, float):
        return int(struct.unpack("q", struct.pack("d", value))[0])
    return int(value)


def shown(code: int, like: Value) -> str:
    """The value behind ``code``, of the kind of ``like``, for an error."""
    if isinstance(like, (str, torch.dtype)):
        return code.to_bytes(8, "big").decode().rstrip()
    if isinstance(like, float):
        return str(struct.unpack("d", struct.pack("q", code))[0])
    return str(bool(code) if isinstance(like, bool) else code)


def exchanged(header: Sequence[int], device: torch.device, group: Group) -> list[list[int]]:
    """Every rank's header. These are the values that have to reach the host."""
    mine = torch.tensor([*header, *[0] * (LENGTH - len(header))], dtype=torch.int64, device=device)
    every = [torch.empty_like(mine) for _ in range(world_size(group))]
    guarded("comparing arguments", group, lambda: dist.all_gather(every, mine, group=group))
    rows: list[list[int]] = torch.stack(every).tolist()
    return rows


def agree(
    call: str, rows: int, tensors: Sequence[Tensor], same: Mapping[str, Value], device: torch.device, group: Group
) -> Agreement:
    """Compare this call with the other ranks'.

    Args:
        call: the public function's name, of :data:`CALLS`.
        rows: this rank's number of rows, free to differ.
        tensors: those whose gradients need all ranks.
        same: what must be equal on all ranks, by the name that the error shows.
        device: where the group's backend takes tensors from.
        group: process group.

    Raises:
        ValueError: two ranks disagree, on every rank with the same message.
        RuntimeError: a rank refused its own arguments (on every other rank), or left.
    """
    recording = torch.is_grad_enabled()
    bits = [recording, *(recording and t.requires_grad for t in tensors)]
    grads = sum(1 << i for i, bit in enumerate(bits) if bit)
    head = [CALLS.index(call), 0, rows, grads]
    every = exchanged([*head, *(encoded(v) for v in same.values())], device, group)
    refused = [rank for rank, theirs in enumerate(every) if theirs[1] == REFUSED]
    if refused:
        raise RuntimeError(
            f"fastxattn.distributed.{call}: rank {refused[0]} refused its arguments, with an error there that names "
            "the reason; no rank goes on"
        )
    _compare("fastxattn.distributed", "the function called", 0, every, CALLS.__getitem__)
    prefix = f"fastxattn.distributed.{call}"
    for at, (name, value) in enumerate(same.items(), len(head)):
        _compare(prefix, name, at, every, functools.partial(shown, like=value))
    flags = [theirs[3] for theirs in every]
    wanted = tuple(any(f >> i & 1 for f in flags) for i in range(1, len(bits)))
    if any(wanted):
        for theirs in every:
            theirs[3] &= RECORDING
        _compare(prefix, "torch.is_grad_enabled()", 3, every, functools.partial(shown, like=True))
    return Agreement([theirs[2] for theirs in every], wanted)


def _compare(prefix: str, name: str, at: int, every: list[list[int]], show: Callable[[int], str]) -> None:
    first = every[0][at]
    for rank, theirs in enumerate(every):
        if theirs[at] != first:
            raise ValueError(
                f"{prefix}: ranks disagree on {name}: rank 0 has {show(first)}, rank {rank} has {show(theirs[at])}; "
                "it must be the same on every rank"
            )


@contextmanager
def announced(call: str, tensor: Any, group: Group) -> Iterator[None]:
    """Notify the other ranks when this one refuses its arguments, so that they raise at once and do not wait."""
    try:
        yield
    except (TypeError, ValueError, RuntimeError):
        held = isinstance(tensor, Tensor) and not tensor.is_meta
        device = tensor.device if held else torch.device("cpu")
        with suppress(RuntimeError):
            exchanged([CALLS.index(call), REFUSED], device, group)
        raise


def plain(name: str, x: Any) -> None:
    """Refuse a DTensor: these functions take what one rank holds."""
    if isinstance(x, Tensor) and hasattr(x, "to_local") and hasattr(x, "device_mesh"):
        raise TypeError(
            f"{name} must be a plain tensor; got a DTensor: pass {name}.to_local() for this rank's rows of a sharded "
            f"one, {name}.full_tensor() for a replicated value or a scale"
        )
