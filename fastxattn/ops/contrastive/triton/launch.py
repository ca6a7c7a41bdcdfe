"""Host side of the Triton kernels: the operators of the schema.

Gradients go through a window of the matrix of at most WINDOW x WINDOW slopes (64 MB), from which both sides'
gradients are made before the next: three products in all, no atomics, and the same sums in the same order every time.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from fastxattn.ops.contrastive.schema import NEEDS, STATS
from fastxattn.ops.contrastive.triton import config
from fastxattn.ops.contrastive.triton.config import WINDOW, Tile
from fastxattn.ops.contrastive.triton.kernels import (
    gradient_kernel,
    positive_kernel,
    sigmoid_kernel,
    slope_kernel,
    stats_kernel,
)

Optional = Tensor | None
STATES = 9


def _stride(x: Tensor) -> int:
    return x.stride(0) if x.shape[0] > 1 else x.shape[1]


def _tiles(tile: Tile) -> dict[str, int]:
    return {
        "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k, "STEPS": tile.steps,
        "num_warps": tile.warps, "num_stages": tile.stages,
    }  # fmt: skip


def positive_logits(
    a: Tensor, b: Tensor, scale: Tensor, bias: Optional, norm_a: Optional, norm_b: Optional, id_a: Tensor,
    id_b: Optional, skip_a: Optional, skip_b: Optional, exact: Optional, exclude_self: bool, blocked: bool,
) -> Tensor:  # fmt: skip
    """The logit of each row of ``a`` with its target ``id_a``."""
    out = a.new_empty(a.shape[0], dtype=torch.float32)
    if a.shape[0]:
        tiles = _tiles(config.pick("stats" if blocked else "positive", a.dtype))
        del tiles["BLOCK_N"]
        positive_kernel[(triton.cdiv(a.shape[0], tiles["BLOCK_M"]),)](
            a, b, scale, bias, norm_a, norm_b, id_a, out, a.shape[0], b.shape[0], a.shape[1], _stride(a), _stride(b),
            blocked, **tiles,
        )  # fmt: skip
    return out


def contrastive_stats(
    a: Tensor, b: Tensor, scale: Tensor, bias: Optional, norm_a: Optional, norm_b: Optional, id_a: Tensor,
    id_b: Tensor, skip_a: Optional, skip_b: Optional, exact: Optional, exclude_self: bool, limit_row: Optional,
    limit_col: Optional, rank_row: Optional, rank_col: Optional, rows: bool, columns: bool, means: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Statistics of both directions, each a pass of its own over the products."""
    sides = (a, norm_a, id_a, skip_a, limit_row, rank_row), (b, norm_b, id_b, skip_b, limit_col, rank_col)
    results = []
    for by_row, wanted in (True, rows), (False, columns):
        (x, norm_x, id_x, skip_x, limit, rank), (y, norm_y, id_y, skip_y, _, _) = sides if by_row else sides[::-1]
        if not wanted or x.shape[0] == 0 or y.shape[0] == 0:
            empty = x.new_zeros((len(STATS), x.shape[0]), dtype=torch.float32)
            empty[0] = -torch.inf
            results.append(empty)
            continue
        tile = config.pick("stats", x.dtype)
        blocks = triton.cdiv(x.shape[0], tile.block_m)
        splits = config.splits(blocks, triton.cdiv(y.shape[0], tile.block_n))
        state = x.new_empty((splits, STATES, x.shape[0]), dtype=torch.float32)
        stats_kernel[(blocks * splits,)](
            x, y, scale, bias, norm_x, norm_y, id_x, id_y, skip_x, skip_y, exact, limit, rank, state, x.shape[0],
            y.shape[0], x.shape[1], _stride(x), _stride(y), by_row, exclude_self, means, splits, **_tiles(tile),
        )  # fmt: skip
        results.append(_finish(state))
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


class _Windows:
    """The windows of the matrix in order of rows, and both gradients as they grow."""

    def __init__(self, a: Tensor, b: Tensor, norm_a: Optional, norm_b: Optional, needs: int, keep_float: bool) -> None:
        self.a, self.b, self.norms = a, b, (norm_a, norm_b)
        self.tile = config.pick("slope", a.dtype)
        self.sides = [min(WINDOW, triton.cdiv(max(x.shape[0], 1), s) * s)
                      for x, s in ((a, self.tile.block_m), (b, self.tile.block_n))]  # fmt: skip
        self.stride = max(self.sides)
        self.wanted = bool(needs & NEEDS["a"]), bool(needs & NEEDS["b"])
        self.keep_float = keep_float
        self.dz = a.new_empty((self.sides[0], self.stride), dtype=torch.float32) if any(self.wanted) else None
        dtype = torch.float32 if keep_float else a.dtype
        self.grad_a = a.new_zeros(a.shape, dtype=dtype) if self.wanted[0] else a.new_empty((0,), dtype=torch.float32)
        self.part_a = a.new_zeros((self.sides[0], a.shape[1]), dtype=torch.float32) if self.wanted[0] else None
        self.grad_b = b.new_zeros(b.shape if self.wanted[1] else (0,), dtype=torch.float32)

    def __iter__(self):  # type: ignore[no-untyped-def]
        """(first row, first column, grid, tiles) of each window; the caller fills ``dz`` before it asks for more."""
        if self.a.shape[0] == 0 or self.b.shape[0] == 0:
            return
        for i in range(0, self.a.shape[0], self.sides[0]):
            rows = min(self.sides[0], self.a.shape[0] - i)
            for j in range(0, self.b.shape[0], self.sides[1]):
                columns = min(self.sides[1], self.b.shape[0] - j)
                grid = triton.cdiv(rows, self.tile.block_m), triton.cdiv(columns, self.tile.block_n)
                yield slice(i, i + rows), j, grid
                if self.part_a is not None:
                    self._multiply(self.b[j:], self.part_a, rows, columns, False)
                if self.wanted[1]:
                    self._multiply(self.a[i:], self.grad_b[j:], columns, rows, True)
            if self.part_a is not None:
                self.grad_a[i : i + rows] = _project(self.part_a[:rows], self.a[i : i + rows], self.norms[0], i)
                self.part_a.zero_()

    def _multiply(self, y: Tensor, out: Tensor, rows: int, columns: int, transposed: bool) -> None:
        tile = config.pick("gradient", y.dtype)
        precision = "ieee" if y.dtype == torch.float32 else "tf32"
        features = y.shape[1]
        gradient_kernel[(triton.cdiv(rows, tile.block_m), triton.cdiv(features, tile.block_n))](
            self.dz, y, out, rows, columns, features, self.stride, _stride(y), transposed, precision,
            tile.block_m, tile.block_n, tile.block_k, num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip

    def finished(self) -> tuple[Tensor, Tensor]:
        """Both gradients."""
        if not self.wanted[1]:
            return self.grad_a, self.grad_b
        for j in range(0, self.b.shape[0] if self.norms[1] is not None else 0, WINDOW):
            rows = slice(j, j + WINDOW)
            self.grad_b[rows] = _project(self.grad_b[rows], self.b[rows], self.norms[1], j)
        return self.grad_a, self.grad_b if self.keep_float else self.grad_b.to(self.b.dtype)


def _project(grad: Tensor, x: Tensor, norm: Optional, first: int) -> Tensor:
    """The gradient through ``x / |x|``: what points along ``x`` falls away."""
    if norm is None:
        return grad
    unit = x.float() * norm[first : first + x.shape[0], None]
    return grad - unit * (unit * grad).sum(1, keepdim=True)


def _slopes(stats: Tensor, grad: Tensor) -> Tensor:
    """(7, rows): lse of negatives, its gradient, the mean's per negative; of positives lse, share, mean, excess."""
    number_neg, number_pos = stats[4], stats[5]
    mean = torch.where(number_neg > 0, grad[1] / number_neg, 0.0)
    return torch.stack(
        [stats[0], grad[0], mean, stats[2] + stats[3], 1 / number_pos.clamp(min=1), grad[2], grad[3]]
    ).contiguous()


def contrastive_backward(
    grad_row: Tensor, grad_col: Tensor, row_stats: Tensor, col_stats: Tensor, a: Tensor, b: Tensor, scale: Tensor,
    bias: Optional, norm_a: Optional, norm_b: Optional, id_a: Tensor, id_b: Tensor, skip_a: Optional,
    skip_b: Optional, exact: Optional, exclude_self: bool, limit_row: Optional, limit_col: Optional, rows: bool,
    columns: bool, needs: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of a and b, and per row the sum of dz * logit / scale."""
    slopes, slopes_col = _slopes(row_stats, grad_row), _slopes(col_stats, grad_col)
    windows = _Windows(a, b, norm_a, norm_b, needs, False)
    dots = a.new_zeros(a.shape[0], dtype=torch.float32)
    for place, j, grid in windows:
        part = dots.new_empty((grid[1], windows.stride))
        slope_kernel[grid](
            a, b, scale, bias, norm_a, norm_b, id_a, id_b, skip_a, skip_b, exact, limit_row, limit_col, slopes,
            slopes_col, windows.dz, part, place.start, j, a.shape[0], b.shape[0], a.shape[1], _stride(a), _stride(b),
            windows.stride, exclude_self, rows, columns, **_tiles(windows.tile),
        )  # fmt: skip
        dots[place] += part[:, : place.stop - place.start].sum(0)
    return (*windows.finished(), dots)


def sigmoid(
    a: Tensor, b: Tensor, scale: Tensor, bias: Optional, norm_a: Optional, norm_b: Optional, id_a: Tensor,
    id_b: Tensor, skip_a: Optional, skip_b: Optional, exact: Optional, exclude_self: bool, weight: Optional,
    needs: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Each row's loss, and with ``needs`` the gradients of their sum weighted by ``weight``, in float32."""
    windows = _Windows(a, b, norm_a, norm_b, needs, True)
    sums = a.new_zeros((3, a.shape[0]), dtype=torch.float32)
    for place, j, grid in windows:
        part = sums.new_empty((3, grid[1], windows.stride))
        sigmoid_kernel[grid](
            a, b, scale, bias, norm_a, norm_b, id_a, id_b, skip_a, skip_b, exact, weight, windows.dz, part,
            place.start, j, a.shape[0], b.shape[0], a.shape[1], _stride(a), _stride(b), windows.stride, exclude_self,
            **_tiles(windows.tile),
        )  # fmt: skip
        sums[:, place] += part[:, :, : place.stop - place.start].sum(1)
    loss, dots, slopes = (s.clone() for s in sums) if needs else (sums[0].clone(), sums[1, :0], sums[2, :0])
    return (loss, *windows.finished(), dots, slopes)
