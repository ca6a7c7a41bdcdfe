"""A row of the composition table, and what makes its inputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Inputs = dict[str, Tensor]
HEADS, DIM, WIDTH = 2, 8, 16
LOSS = ("a", "b")


@dataclass(frozen=True)
class Row:
    """One problem. ``call(module, inputs)`` gives a tensor or a tuple; ``module`` is None for functions."""

    name: str
    covers: tuple[str, ...]
    """Public names that this row stands for."""
    inputs: Callable[[Any, int], Inputs]
    """Of a :class:`Make` and a size, 0 or 1: floating point inputs are differentiable, integers and masks are not."""
    call: Callable[[Any, Inputs], Any]
    build: Callable[[], nn.Module] | None = None
    derivative: bool = True
    """False: indices, masks and metrics, which have none."""
    same: tuple[tuple[str, ...], ...] = ()
    """Groups of inputs that may be one tensor."""
    ragged: tuple[int, int] | None = None
    """Results (i, j) of which i has as many rows as offsets j say; a traced call may give more, which nothing reads."""
    constant: tuple[str, ...] = ()
    """Floating point inputs without a gradient: teachers, scores that rank."""

    def made(self, size: int) -> Inputs:
        """Inputs of a size; the same each time."""
        return self.inputs(Make(size), size)


class Make:
    """Random inputs of a row."""

    shift = 0
    """Added to every seed: other inputs of the same shapes."""

    def __init__(self, seed: int) -> None:
        self.g = torch.Generator().manual_seed(seed + self.shift)

    def rows(self, *shape: int) -> Tensor:
        """Normal numbers."""
        return torch.randn(*shape, generator=self.g)

    def unit(self, *shape: int) -> Tensor:
        """Rows of length 1."""
        return nn.functional.normalize(self.rows(*shape), dim=-1)

    def positive(self, *shape: int) -> Tensor:
        """Weights."""
        return torch.rand(*shape, generator=self.g) + 0.1


def only(*names: str, of: Callable[[Make, int], Inputs]) -> Callable[[Make, int], Inputs]:
    """These inputs of a larger problem."""
    return lambda m, size: {name: t for name, t in of(m, size).items() if name in names}


def lengths(size: int) -> tuple[list[int], list[int]]:
    """Of the queries' and of the keys' sequences: the same number, and the larger problem has one more."""
    return ([4, 5], [5, 7]) if size == 0 else ([4, 5, 2], [6, 0, 8])


def mask(of: list[int]) -> Tensor:
    """(batch, longest) boolean."""
    return torch.arange(max(of)) < torch.tensor(of)[:, None]


def ranges(of_q: list[int], of_k: list[int]) -> Tensor:
    """Each query sees all but the last key of its sequence."""
    return torch.tensor([[0, max(k - 1, 0)] for q, k in zip(of_q, of_k, strict=True) for _ in range(q)]).int()
