"""Host side of the Triton kernels: the operators of the schema.

Gradients are made window by window (:mod:`fastxattn.ops.contrastive.windows`): three products in all, no atomics.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from fastxattn.ops.contrastive.schema import WIDE
from fastxattn.ops.contrastive.triton import config
from fastxattn.ops.contrastive.triton.config import Tile
from fastxattn.ops.contrastive.triton.kernels import (
    positive_kernel,
    sigmoid_kernel,
    slope_kernel,
    stats_kernel,
)
from fastxattn.ops.contrastive.windows import STATES, Windows, sigmoid_results, slopes_of, statistics

Optional = Tensor | None


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

    def running(side: tuple[Any, ...], other: tuple[Any, ...], by_row: bool) -> Tensor:
        (x, norm_x, id_x, skip_x, limit, rank), (y, norm_y, id_y, skip_y, _, _) = side, other
        tile = config.pick("stats", x.dtype)
        blocks = triton.cdiv(x.shape[0], tile.block_m)
        splits = config.splits(blocks, triton.cdiv(y.shape[0], tile.block_n))
        state = x.new_empty((splits, STATES, x.shape[0]), dtype=torch.float32)
        stats_kernel[(blocks * splits,)](
            x, y, scale, bias, norm_x, norm_y, id_x, id_y, skip_x, skip_y, exact, limit, rank, state, x.shape[0],
            y.shape[0], x.shape[1], _stride(x), _stride(y), by_row, exclude_self, means, splits, **_tiles(tile),
        )  # fmt: skip
        return state

    return statistics(sides, rows, columns, running)


def _windows(a: Tensor, b: Tensor, norm_a: Optional, norm_b: Optional, needs: int, keep_float: bool) -> Windows:
    tile = config.pick("slope", a.dtype)
    return Windows(a, b, norm_a, norm_b, needs, keep_float, (tile.block_m, tile.block_n), a.dtype != torch.float32)


def contrastive_backward(
    grad_row: Tensor, grad_col: Tensor, row_stats: Tensor, col_stats: Tensor, a: Tensor, b: Tensor, scale: Tensor,
    bias: Optional, norm_a: Optional, norm_b: Optional, id_a: Tensor, id_b: Tensor, skip_a: Optional,
    skip_b: Optional, exact: Optional, exclude_self: bool, limit_row: Optional, limit_col: Optional, rows: bool,
    columns: bool, needs: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of a and b, and per row the sum of dz * logit / scale."""
    slopes, slopes_col = slopes_of(row_stats, grad_row), slopes_of(col_stats, grad_col)
    windows = _windows(a, b, norm_a, norm_b, needs, bool(needs & WIDE))

    def launch(place: slice, j: int, grid: tuple[int, int], part: Tensor) -> None:
        slope_kernel[grid](
            a, b, scale, bias, norm_a, norm_b, id_a, id_b, skip_a, skip_b, exact, limit_row, limit_col, slopes,
            slopes_col, windows.dz, part, place.start, j, a.shape[0], b.shape[0], a.shape[1], _stride(a), _stride(b),
            windows.stride, windows.plane, exclude_self, rows, columns, **_tiles(config.pick("slope", a.dtype)),
        )  # fmt: skip

    (dots,) = windows.summed(1, launch)
    return (*windows.finished(), dots)


def sigmoid(
    a: Tensor, b: Tensor, scale: Tensor, bias: Optional, norm_a: Optional, norm_b: Optional, id_a: Tensor,
    id_b: Tensor, skip_a: Optional, skip_b: Optional, exact: Optional, exclude_self: bool, weight: Optional,
    needs: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Each row's loss, and with ``needs`` the gradients of their sum weighted by ``weight``, in float32."""
    windows = _windows(a, b, norm_a, norm_b, needs, True)

    def launch(place: slice, j: int, grid: tuple[int, int], part: Tensor) -> None:
        sigmoid_kernel[grid](
            a, b, scale, bias, norm_a, norm_b, id_a, id_b, skip_a, skip_b, exact, weight, windows.dz, part,
            place.start, j, a.shape[0], b.shape[0], a.shape[1], _stride(a), _stride(b), windows.stride,
            windows.plane, exclude_self, **_tiles(config.pick("slope", a.dtype)),
        )  # fmt: skip

    return sigmoid_results(windows, windows.summed(3, launch), needs)
