"""The CUDA C++ kernels of the contrastive losses, forward and backward.

The kernels make statistics, losses and slopes; the products of a window of slopes with the features are torch's own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastxattn.ops.contrastive import schema  # noqa: F401  (defines the operators)
from fastxattn.ops.contrastive.problem import Problem
from fastxattn.ops.contrastive.schema import WIDE
from fastxattn.ops.contrastive.windows import STATES, Windows, sigmoid_results, slopes_of, statistics, up
from fastxattn.runtime import cuda

TILE = 64
BLOCKS, MOST_SPLITS = 512, 16
"""Columns are cut into at most MOST_SPLITS shares, until there are about BLOCKS blocks."""
Optional = Tensor | None


def supports(problem: Problem) -> str | None:
    """None when the kernels run this problem, else why not."""
    if torch.float64 in (problem.a.dtype, problem.scale.dtype):
        return "computes in float32; the features or the scale are float64"
    if torch.onnx.is_in_onnx_export():
        return "ONNX files hold losses as standard operators, which the reference is made of"
    return cuda.unavailable(problem.a.device)


def positive_logits(
    a: Tensor, b: Tensor, scale: Tensor, bias: Optional, norm_a: Optional, norm_b: Optional, id_a: Tensor,
    id_b: Optional, skip_a: Optional, skip_b: Optional, exact: Optional, exclude_self: bool, blocked: bool,
) -> Tensor:  # fmt: skip
    """The logit of each row of ``a`` with its target ``id_a``, summed in float64; 0 without one.

    ``blocked``: as the statistics round it, infinity without one, which no negative reaches.
    """
    has, target = id_a >= 0, id_a.clamp(min=0)
    if blocked:
        rounded = a.new_empty(a.shape[0], dtype=torch.float32)
        if a.shape[0] and b.shape[0]:
            cuda.launch("contrastive_positives", rounded, a, b, scale, bias, norm_a, norm_b, target, cuda.aligned(a, b))
        return torch.where(has, rounded, torch.inf)
    target = target.long()
    out = torch.zeros(a.shape[0], dtype=torch.float64, device=a.device)
    for first in range(0, a.shape[0], 8192):
        rows = slice(first, first + 8192)
        out[rows] = torch.linalg.vecdot(a[rows].double(), b[target[rows]].double())
    for norm, at in ((norm_a, slice(None)), (norm_b, target)):
        out = out if norm is None else out * norm[at]
    out = out * scale if bias is None else out * scale + bias
    return torch.where(has, out, 0.0).float()


def contrastive_stats(
    a: Tensor, b: Tensor, scale: Tensor, bias: Optional, norm_a: Optional, norm_b: Optional, id_a: Tensor,
    id_b: Tensor, skip_a: Optional, skip_b: Optional, exact: Optional, exclude_self: bool, limit_row: Optional,
    limit_col: Optional, rank_row: Optional, rank_col: Optional, rows: bool, columns: bool, means: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Statistics of both directions, each a pass of its own over the products."""
    sides = (a, norm_a, id_a, skip_a, limit_row, rank_row), (b, norm_b, id_b, skip_b, limit_col, rank_col)

    def running(side: tuple[Any, ...], other: tuple[Any, ...], by_row: bool) -> Tensor:
        (x, norm_x, id_x, skip_x, limit, rank), (y, norm_y, id_y, skip_y, _, _) = side, other
        splits = max(1, min(BLOCKS // up(x.shape[0], TILE), MOST_SPLITS, up(y.shape[0], TILE)))
        state = x.new_empty((splits, STATES, x.shape[0]), dtype=torch.float32)
        cuda.launch(
            "contrastive_stats", state, x, y, scale, bias, norm_x, norm_y, id_x, id_y, skip_x, skip_y, exact, limit,
            rank, by_row, exclude_self, means, cuda.aligned(x, y),
        )  # fmt: skip
        return state

    return statistics(sides, rows, columns, running)


def _windows(a: Tensor, b: Tensor, norm_a: Optional, norm_b: Optional, needs: int, keep_float: bool) -> Windows:
    return Windows(a, b, norm_a, norm_b, needs, keep_float, (TILE, TILE))


def contrastive_backward(
    grad_row: Tensor, grad_col: Tensor, row_stats: Tensor, col_stats: Tensor, a: Tensor, b: Tensor, scale: Tensor,
    bias: Optional, norm_a: Optional, norm_b: Optional, id_a: Tensor, id_b: Tensor, skip_a: Optional,
    skip_b: Optional, exact: Optional, exclude_self: bool, limit_row: Optional, limit_col: Optional, rows: bool,
    columns: bool, needs: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of a and b, and per row the sum of dz * logit / scale."""
    slopes_a = slopes_of(row_stats, grad_row) if rows else None
    slopes_b = slopes_of(col_stats, grad_col) if columns else None
    windows = _windows(a, b, norm_a, norm_b, needs, bool(needs & WIDE))

    def launch(place: slice, j: int, _: tuple[int, int], part: Tensor) -> None:
        cuda.launch(
            "contrastive_slopes", windows.dz, part, a, b, scale, bias, norm_a, norm_b, id_a, id_b, skip_a, skip_b,
            exact, limit_row, limit_col, slopes_a, slopes_b, exclude_self, place.start, j, place.stop - place.start,
            min(windows.sides[1], b.shape[0] - j), cuda.aligned(a, b),
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

    def launch(place: slice, j: int, _: tuple[int, int], part: Tensor) -> None:
        cuda.launch(
            "sigmoid", windows.dz, part, a, b, scale, bias, norm_a, norm_b, id_a, id_b, skip_a, skip_b, exact, weight,
            exclude_self, place.start, j, place.stop - place.start, min(windows.sides[1], b.shape[0] - j),
            cuda.aligned(a, b),
        )  # fmt: skip

    return sigmoid_results(windows, windows.summed(3, launch), needs)


for _function in (positive_logits, contrastive_stats, contrastive_backward, sigmoid):
    torch.library.impl(f"fastxattn::{_function.__name__}_cuda", "CUDA", _function)
