"""Host side of the losses on a GPU, whoever's kernels run: finished statistics, and gradients by windows.

Gradients go through a window of the matrix of at most WINDOW x WINDOW slopes (64 MB), from which both sides'
gradients are made before the next: the same sums in the same order every time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastxattn.ops.contrastive.operator import NEEDS, STATS
from fastxattn.ops.contrastive.problem import Statistics

STATES = 9
"""Planes of running statistics: top, exp, sum, count, ahead of the negatives; top, exp, sum, count of the positives."""
WINDOW = 4096
"""Rows and columns of the window of slopes that the gradients are made from."""


def up(n: int, block: int) -> int:
    """How many blocks cover ``n``."""
    return -(-n // block)


def statistics(p: Statistics, running: Callable[[Statistics, bool], Tensor]) -> tuple[Tensor, Tensor]:
    """Finished statistics of both directions, each a pass of its own over the products.

    ``running(p, by_row)`` returns (splits, STATES, rows) of the rows of ``p``, which for columns is swapped.
    """
    results = []
    for side, by_row in (p, True), (p.swapped(), False):
        if (p.rows if by_row else p.columns) and side.a.shape[0] and side.b.shape[0]:
            results.append(_finish(running(side, by_row)))
        else:
            nothing = side.a.new_zeros((len(STATS), side.a.shape[0]), dtype=torch.float32)
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
    lse = torch.where(exps == 0, -torch.inf, top + exps.log())
    mean = torch.where(negatives > 0, state[:, 2].sum(0) / negatives, 0.0)
    excess = torch.where(positives > 1, excess, 0.0)
    return torch.stack([lse, mean, mean_pos, excess, negatives, positives, ahead])


def split(x: Tensor) -> tuple[Tensor, Tensor]:
    """``x`` as a sum of two bfloat16 tensors: to 2^-17 of each number, and all of a float16."""
    high = x.bfloat16()
    return high, (x.float() - high.float()).bfloat16()


def add_product(out: Tensor, left: Sequence[Tensor], right: Sequence[Tensor]) -> None:
    """``out += sum(left) @ sum(right)`` in float32, less the products of rests; by torch's own product.

    In bfloat16 with float32 sums it runs on the matrix units at their full rate, as a float32 product would not.
    """
    for i, x in enumerate(left):
        for y in right[: len(left) - i]:
            if x.dtype == torch.float32 or not x.is_cuda or torch.version.hip is not None:
                out.addmm_(x.float(), y.float())
            else:
                out += torch.mm(x, y, out_dtype=torch.float32)


class Window(NamedTuple):
    """A window of the matrix: where it starts, its size and the grid of tiles over it."""

    first_row: int
    first_column: int
    rows: int
    columns: int
    grid: tuple[int, int]

    @property
    def bounds(self) -> tuple[int, int, int, int]:
        """First row, first column, rows and columns."""
        return self[:4]


class Windows:
    """The windows of the matrix in order of rows, and both gradients as they grow."""

    def __init__(
        self,
        a: Tensor,
        b: Tensor,
        norms: tuple[Tensor | None, Tensor | None],
        needs: int,
        keep_float: bool,
        blocks: tuple[int, int],
        split_dz: bool = False,
    ) -> None:
        """How it is made.

        Args:
            blocks: rows and columns of the slope kernel's tiles.
            split_dz: whether that kernel writes ``dz`` as :func:`split` would, (2, rows, columns), or in float32.
        """
        self.a, self.b, self.norms, self.blocks = a, b, norms, blocks
        self.sides = [min(WINDOW, up(max(x.shape[0], 1), s) * s) for x, s in ((a, blocks[0]), (b, blocks[1]))]
        self.stride = max(self.sides)
        self.plane = self.sides[0] * self.stride
        self.asked = bool(needs & NEEDS["a"]), bool(needs & NEEDS["b"])
        self.keep_float = keep_float
        self.dz = None
        if any(self.asked):
            shape, kept = (self.sides[0], self.stride), torch.bfloat16 if split_dz else torch.float32
            self.dz = a.new_empty((2, *shape) if split_dz else shape, dtype=kept)
        dtype = torch.float32 if keep_float else a.dtype
        self.grad_a = a.new_zeros(a.shape, dtype=dtype) if self.asked[0] else a.new_empty((0,), dtype=torch.float32)
        self.part_a = a.new_zeros((self.sides[0], a.shape[1]), dtype=torch.float32) if self.asked[0] else None
        self.grad_b = b.new_zeros(b.shape if self.asked[1] else (0,), dtype=torch.float32)

    def __iter__(self) -> Iterator[Window]:
        """Each window; the caller fills ``dz`` before it asks for more."""
        if self.a.shape[0] == 0 or self.b.shape[0] == 0:
            return
        for i in range(0, self.a.shape[0], self.sides[0]):
            rows = min(self.sides[0], self.a.shape[0] - i)
            for j in range(0, self.b.shape[0], self.sides[1]):
                columns = min(self.sides[1], self.b.shape[0] - j)
                yield Window(i, j, rows, columns, (up(rows, self.blocks[0]), up(columns, self.blocks[1])))
                if self.dz is None:
                    continue
                dz = [t[:rows, :columns] for t in self._terms(self.dz)]
                if self.part_a is not None:
                    add_product(self.part_a[:rows], dz, self._terms(self.b[j : j + columns]))
                if self.asked[1]:
                    add_product(self.grad_b[j : j + columns], [t.T for t in dz], self._terms(self.a[i : i + rows]))
            if self.part_a is not None:
                self.grad_a[i : i + rows] = _project(self.part_a[:rows], self.a[i : i + rows], self.norms[0], i)
                self.part_a.zero_()

    def _terms(self, x: Tensor) -> Sequence[Tensor]:
        """Slopes or features as terms for :func:`add_product`: one where the features are float32 or bfloat16."""
        if x.dim() == 3:
            return x.unbind()
        return (x,) if self.a.dtype == torch.float32 or x.dtype == torch.bfloat16 else split(x)

    def summed(self, values: int, launch: Callable[[Window, Tensor], None]) -> Tensor:
        """(values, rows of a) float32: what ``launch`` leaves of each row in every window, added up.

        ``launch(window, part)`` fills ``dz`` and ``part``, (values, tiles of columns, stride).
        """
        sums = self.a.new_zeros((values, self.a.shape[0]), dtype=torch.float32)
        for window in self:
            part = sums.new_empty((values, window.grid[1], self.stride))
            launch(window, part)
            sums[:, window.first_row : window.first_row + window.rows] += part[:, :, : window.rows].sum(1)
        return sums

    def finished(self) -> tuple[Tensor, Tensor]:
        """Both gradients."""
        if not self.asked[1]:
            return self.grad_a, self.grad_b
        for j in range(0, self.b.shape[0] if self.norms[1] is not None else 0, WINDOW):
            rows = slice(j, j + WINDOW)
            self.grad_b[rows] = _project(self.grad_b[rows], self.b[rows], self.norms[1], j)
        return self.grad_a, self.grad_b if self.keep_float else self.grad_b.to(self.b.dtype)


def sigmoid_results(windows: Windows, sums: Tensor, needs: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What the sigmoid operator returns, from each row's loss, sum of slope * logit / scale and sum of slopes."""
    loss, dots, slopes = (s.clone() for s in sums) if needs else (sums[0].clone(), sums[1, :0], sums[2, :0])
    return (loss, *windows.finished(), dots, slopes)


def _project(grad: Tensor, x: Tensor, norm: Tensor | None, first: int) -> Tensor:
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
