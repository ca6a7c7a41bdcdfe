"""Host side of the Triton kernels: the operators.

Gradients are made window by window (:mod:`fastxattn.ops.contrastive.windows`): three products in all, no atomics.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from fastxattn.ops.contrastive.operator import WIDE
from fastxattn.ops.contrastive.problem import Pairs, Sigmoid, Slopes, Statistics
from fastxattn.ops.contrastive.triton import tiles
from fastxattn.ops.contrastive.triton.kernels import positive_kernel, sigmoid_kernel, slope_kernel, stats_kernel
from fastxattn.ops.contrastive.windows import STATES, Window, Windows, sigmoid_results, slopes_of, statistics


def _sizes(p: Pairs) -> tuple[int, ...]:
    """Rows of both sides, features, strides of both sides."""
    strides = (x.stride(0) if x.shape[0] > 1 else x.shape[1] for x in (p.a, p.b))
    return p.a.shape[0], p.b.shape[0], p.a.shape[1], *strides


def positive_logits(*arguments: Any) -> Tensor:
    """The logit of each row of ``a`` with its target ``id_a``."""
    *values, blocked = arguments
    p = Pairs.of(values)
    out = p.a.new_empty(p.a.shape[0], dtype=torch.float32)
    if p.a.shape[0]:
        options = tiles.pick("stats" if blocked else "positive", p.a.dtype).options()
        del options["BLOCK_N"]
        sides = (p.a, p.b, p.scale, p.bias, p.norm_a, p.norm_b, p.id_a)
        grid = (triton.cdiv(p.a.shape[0], options["BLOCK_M"]),)
        positive_kernel[grid](*sides, out, *_sizes(p), blocked, **options)
    return out


def contrastive_stats(*values: Any) -> tuple[Tensor, Tensor]:
    """Statistics of both directions, each a pass of its own over the products."""
    return statistics(Statistics.of(values), _running)


def _running(p: Statistics, by_row: bool) -> Tensor:
    tile = tiles.pick("stats", p.a.dtype)
    blocks = triton.cdiv(p.a.shape[0], tile.block_m)
    splits = tiles.splits(blocks, triton.cdiv(p.b.shape[0], tile.block_n))
    state = p.a.new_empty((splits, STATES, p.a.shape[0]), dtype=torch.float32)
    flags = (by_row, p.exclude_self, p.means, splits)
    stats_kernel[(blocks * splits,)](*p.matrix(), p.limit_row, p.rank_row, state, *_sizes(p), *flags, **tile.options())
    return state


def _windows(p: Pairs, needs: int, keep_float: bool) -> Windows:
    tile = tiles.pick("slope", p.a.dtype)
    blocks, halves = (tile.block_m, tile.block_n), p.a.dtype != torch.float32
    return Windows(p.a, p.b, (p.norm_a, p.norm_b), needs, keep_float, blocks, halves)


def _window(p: Pairs, windows: Windows, window: Window) -> tuple[int, ...]:
    """Where a window lies in the matrix and in its buffer."""
    return window.first_row, window.first_column, *_sizes(p), windows.stride, windows.plane


def contrastive_backward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of a and b, and per row the sum of dz * logit / scale."""
    grad_row, grad_col, row_stats, col_stats, *values, needs = arguments
    p = Slopes.of(values)
    slopes = slopes_of(row_stats, grad_row), slopes_of(col_stats, grad_col)
    windows = _windows(p, needs, bool(needs & WIDE))
    options = tiles.pick("slope", p.a.dtype).options()

    def launch(window: Window, part: Tensor) -> None:
        pointers = (*p.matrix(), p.limit_row, p.limit_col, *slopes, windows.dz, part)
        flags = (p.exclude_self, p.rows, p.columns)
        slope_kernel[window.grid](*pointers, *_window(p, windows, window), *flags, **options)

    (dots,) = windows.summed(1, launch)
    return (*windows.finished(), dots)


def sigmoid(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Each row's loss, and with ``needs`` the gradients of their sum weighted by ``weight``, in float32."""
    *values, needs = arguments
    p = Sigmoid.of(values)
    windows = _windows(p, needs, True)
    options = tiles.pick("slope", p.a.dtype).options()

    def launch(window: Window, part: Tensor) -> None:
        pointers = (*p.matrix(), p.weight, windows.dz, part)
        sigmoid_kernel[window.grid](*pointers, *_window(p, windows, window), p.exclude_self, **options)

    return sigmoid_results(windows, windows.summed(3, launch), needs)
