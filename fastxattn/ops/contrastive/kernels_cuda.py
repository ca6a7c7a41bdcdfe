"""The CUDA C++ kernels of the contrastive losses, forward and backward.

The kernels make statistics, losses and slopes; the products of a window of slopes with the features are torch's own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastxattn.ops.contrastive.operator import WIDE
from fastxattn.ops.contrastive.problem import Pairs, Sigmoid, Slopes, Statistics
from fastxattn.ops.contrastive.windows import STATES, Window, Windows, sigmoid_results, slopes_of, statistics, up
from fastxattn.runtime import cuda

TILE = 64
BLOCKS, MOST_SPLITS = 512, 16
"""Columns are cut into at most MOST_SPLITS shares, until there are about BLOCKS blocks."""


def positive_logits(*arguments: Any) -> Tensor:
    """The logit of each row of ``a`` with its target ``id_a``, summed in float64; 0 without one.

    ``blocked``: as the statistics round it, infinity without one, which no negative reaches.
    """
    *values, blocked = arguments
    p = Pairs.of(values)
    assert p.id_a is not None
    has, target = p.id_a >= 0, p.id_a.clamp(min=0)
    rows = p.a.shape[0]
    if blocked:
        rounded = p.a.new_empty(rows, dtype=torch.float32)
        if rows and p.b.shape[0]:
            sides = (p.a, p.b, p.scale, p.bias, p.norm_a, p.norm_b)
            cuda.launch("contrastive_positives", rounded, *sides, target, cuda.aligned(p.a, p.b))
        return torch.where(has, rounded, torch.inf)
    target = target.long()
    out = torch.zeros(rows, dtype=torch.float64, device=p.a.device)
    for first in range(0, rows, 8192):
        part = slice(first, first + 8192)
        out[part] = torch.linalg.vecdot(p.a[part].double(), p.b[target[part]].double())
    for norm, at in ((p.norm_a, slice(None)), (p.norm_b, target)):
        out = out if norm is None else out * norm[at]
    out = out * p.scale if p.bias is None else out * p.scale + p.bias
    return torch.where(has, out, 0.0).float()


def contrastive_stats(*values: Any) -> tuple[Tensor, Tensor]:
    """Statistics of both directions, each a pass of its own over the products."""
    return statistics(Statistics.of(values), _running)


def _running(p: Statistics, by_row: bool) -> Tensor:
    splits = max(1, min(BLOCKS // up(p.a.shape[0], TILE), MOST_SPLITS, up(p.b.shape[0], TILE)))
    state = p.a.new_empty((splits, STATES, p.a.shape[0]), dtype=torch.float32)
    flags = (by_row, p.exclude_self, p.means, cuda.aligned(p.a, p.b))
    cuda.launch("contrastive_stats", state, *p.matrix(), p.limit_row, p.rank_row, *flags)
    return state


def _windows(p: Pairs, needs: int, keep_float: bool) -> Windows:
    return Windows(p.a, p.b, (p.norm_a, p.norm_b), needs, keep_float, (TILE, TILE))


def contrastive_backward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of a and b, and per row the sum of dz * logit / scale."""
    grad_row, grad_col, row_stats, col_stats, *values, needs = arguments
    p = Slopes.of(values)
    slopes = slopes_of(row_stats, grad_row) if p.rows else None, slopes_of(col_stats, grad_col) if p.columns else None
    windows = _windows(p, needs, bool(needs & WIDE))
    limits = (p.limit_row, p.limit_col)

    def launch(window: Window, part: Tensor) -> None:
        where = (p.exclude_self, *window.bounds, cuda.aligned(p.a, p.b))
        cuda.launch("contrastive_slopes", windows.dz, part, *p.matrix(), *limits, *slopes, *where)

    (dots,) = windows.summed(1, launch)
    return (*windows.finished(), dots)


def sigmoid(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Each row's loss, and with ``needs`` the gradients of their sum weighted by ``weight``, in float32."""
    *values, needs = arguments
    p = Sigmoid.of(values)
    windows = _windows(p, needs, True)

    def launch(window: Window, part: Tensor) -> None:
        where = (p.exclude_self, *window.bounds, cuda.aligned(p.a, p.b))
        cuda.launch("sigmoid", windows.dz, part, *p.matrix(), p.weight, *where)

    return sigmoid_results(windows, windows.summed(3, launch), needs)
