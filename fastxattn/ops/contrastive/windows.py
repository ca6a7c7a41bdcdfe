"""Host side of the losses on a GPU, whoever's kernels run: finished statistics, and gradients by windows.

Gradients go through a window of the matrix of at most WINDOW x WINDOW slopes (64 MB), from which both sides'
gradients are made before the next: the same sums in the same order every time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from fastxattn.ops.contrastive.schema import NEEDS, STATS

Optional = Tensor | None
STATES = 9
"""Planes of running statistics: top, exp, sum, count, ahead of the negatives; top, exp, sum, count of the positives."""
WINDOW = 4096
"""Rows and columns of the window of slopes that the gradients are made from."""


def up(n: int, block: int) -> int:
    """How many blocks cover ``n``."""
    return -(-n // block)


def statistics(
    sides: tuple[tuple[Any, ...], tuple[Any, ...]], rows: bool, columns: bool, running: Callable[..., Tensor]
) -> tuple[Tensor, Tensor]:
    """Finished statistics of both directions, each a pass of its own over the products.

    A side begins with its features; ``running(side, other, by_row)`` gives (splits, STATES, rows) of a direction.
    """
    results = []
    for by_row, wanted in (True, rows), (False, columns):
        side, other = sides if by_row else sides[::-1]
        if wanted and side[0].shape[0] and other[0].shape[0]:
            results.append(_finish(running(side, other, by_row)))
        else:
            nothing = side[0].new_zeros((len(STATS), side[0].shape[0]), dtype=torch.float32)
            nothing[0] = -torch.inf
            results.append(nothing)
    return results[0], results[1]


def _lse(top: Tensor, exps: Tensor) -> tuple[Tensor, Tensor]:
    """The (maximum, sum of exponentials) of all splits."""
    highest = top.amax(0)
    safe = torch.where(highest == -torch.inf, 0.0, highest)
    return safe, (exps * torch.exp(top - safe)).sum(0)


def _finish(state: Tensor) -> Tensor:
    """(7, rows) statistics from the splits' running ones; NaN must survive, only an exact zero means nothing."""
    top, exps = _lse(state[:, 0], state[:, 1])
    negatives, ahead = state[:, 3].sum(0), state[:, 4].sum(0)
    top_pos, exps_pos = _lse(state[:, 5], state[:, 6])
    positives = state[:, 8].sum(0)
    mean_pos = torch.where(positives > 0, state[:, 7].sum(0) / positives, 0.0)
    excess = (top_pos - mean_pos + exps_pos.log()).clamp(min=0)
    return torch.stack([
        torch.where(exps == 0, -torch.inf, top + exps.log()),
        torch.where(negatives > 0, state[:, 2].sum(0) / negatives, 0.0),
        mean_pos,
        torch.where(positives > 1, excess, 0.0),
        negatives,
        positives,
        ahead,
    ])  # fmt: skip


def multiply(dz: Tensor, y: Tensor, out: Tensor, rows: int, columns: int, transposed: bool) -> None:
    """What :class:`Windows` wants, by torch's own product in float32."""
    out[:rows].addmm_(dz[:columns, :rows].T if transposed else dz[:rows, :columns], y[:columns].float())


class Windows:
    """The windows of the matrix in order of rows, and both gradients as they grow."""

    def __init__(
        self, a: Tensor, b: Tensor, norm_a: Optional, norm_b: Optional, needs: int, keep_float: bool,
        blocks: tuple[int, int], multiply: Callable[[Tensor, Tensor, Tensor, int, int, bool], None],
    ) -> None:  # fmt: skip
        """How it is made.

        ``blocks``: rows and columns of the slope kernel's tiles. ``multiply(dz, y, out, rows, columns, transposed)``:
        ``out[:rows] += dz @ y[:columns]`` of the upper left part of dz, or of its transpose.
        """
        self.multiply = multiply
        self.a, self.b, self.norms, self.blocks = a, b, (norm_a, norm_b), blocks
        self.sides = [min(WINDOW, up(max(x.shape[0], 1), s) * s) for x, s in ((a, blocks[0]), (b, blocks[1]))]
        self.stride = max(self.sides)
        self.wanted = bool(needs & NEEDS["a"]), bool(needs & NEEDS["b"])
        self.keep_float = keep_float
        self.dz = a.new_empty((self.sides[0], self.stride), dtype=torch.float32) if any(self.wanted) else None
        dtype = torch.float32 if keep_float else a.dtype
        self.grad_a = a.new_zeros(a.shape, dtype=dtype) if self.wanted[0] else a.new_empty((0,), dtype=torch.float32)
        self.part_a = a.new_zeros((self.sides[0], a.shape[1]), dtype=torch.float32) if self.wanted[0] else None
        self.grad_b = b.new_zeros(b.shape if self.wanted[1] else (0,), dtype=torch.float32)

    def __iter__(self) -> Iterator[tuple[slice, int, tuple[int, int]]]:
        """(first row, first column, grid, tiles) of each window; the caller fills ``dz`` before it asks for more."""
        if self.a.shape[0] == 0 or self.b.shape[0] == 0:
            return
        for i in range(0, self.a.shape[0], self.sides[0]):
            rows = min(self.sides[0], self.a.shape[0] - i)
            for j in range(0, self.b.shape[0], self.sides[1]):
                columns = min(self.sides[1], self.b.shape[0] - j)
                grid = up(rows, self.blocks[0]), up(columns, self.blocks[1])
                yield slice(i, i + rows), j, grid
                if self.dz is None:
                    continue
                if self.part_a is not None:
                    self.multiply(self.dz, self.b[j:], self.part_a, rows, columns, False)
                if self.wanted[1]:
                    self.multiply(self.dz, self.a[i:], self.grad_b[j:], columns, rows, True)
            if self.part_a is not None:
                self.grad_a[i : i + rows] = _project(self.part_a[:rows], self.a[i : i + rows], self.norms[0], i)
                self.part_a.zero_()

    def summed(self, values: int, launch: Callable[[slice, int, tuple[int, int], Tensor], None]) -> Tensor:
        """(values, rows of a) float32: what ``launch`` leaves of each row in every window, added up.

        ``launch(place, j, grid, part)`` fills ``dz`` and ``part``, (values, tiles of columns, stride).
        """
        sums = self.a.new_zeros((values, self.a.shape[0]), dtype=torch.float32)
        for place, j, grid in self:
            part = sums.new_empty((values, grid[1], self.stride))
            launch(place, j, grid, part)
            sums[:, place] += part[:, :, : place.stop - place.start].sum(1)
        return sums

    def finished(self) -> tuple[Tensor, Tensor]:
        """Both gradients."""
        if not self.wanted[1]:
            return self.grad_a, self.grad_b
        for j in range(0, self.b.shape[0] if self.norms[1] is not None else 0, WINDOW):
            rows = slice(j, j + WINDOW)
            self.grad_b[rows] = _project(self.grad_b[rows], self.b[rows], self.norms[1], j)
        return self.grad_a, self.grad_b if self.keep_float else self.grad_b.to(self.b.dtype)


def sigmoid_results(windows: Windows, sums: Tensor, needs: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What the sigmoid operator returns, from each row's loss, sum of slope * logit / scale and sum of slopes."""
    loss, dots, slopes = (s.clone() for s in sums) if needs else (sums[0].clone(), sums[1, :0], sums[2, :0])
    return (loss, *windows.finished(), dots, slopes)


def _project(grad: Tensor, x: Tensor, norm: Optional, first: int) -> Tensor:
    """The gradient through ``x / |x|``: what points along ``x`` falls away."""
    if norm is None:
        return grad
    unit = x.float() * norm[first : first + x.shape[0], None]
    return grad - unit * (unit * grad).sum(1, keepdim=True)


def slopes_of(stats: Tensor, grad: Tensor) -> Tensor:
    """(7, rows): lse of negatives, its gradient, the mean's per negative; of positives lse, share, mean, excess."""
    number_neg, number_pos = stats[4], stats[5]
    mean = torch.where(number_neg > 0, grad[1] / number_neg, 0.0)
    return torch.stack(
        [stats[0], grad[0], mean, stats[2] + stats[3], 1 / number_pos.clamp(min=1), grad[2], grad[3]]
    ).contiguous()
