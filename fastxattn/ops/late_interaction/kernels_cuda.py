"""The CUDA C++ kernels of late interaction: best matches in both directions from one pass, and their gradients.

The gradient of maxima is sparse and one kernel's work. Under a smooth maximum every pair of tokens has a weight:
these go through a window, whose products with the tokens are torch's, as in the contrastive losses.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastxattn.ops.contrastive.windows import Windows, up
from fastxattn.ops.late_interaction.operator import gradients, results
from fastxattn.ops.late_interaction.problem import Problem, SmoothProblem, smooth_of
from fastxattn.runtime import cuda

TILE, FEATURES = 64, 128
"""Tokens of a tile of pairs and of a block of the gradient; features of such a block."""
BLOCKS, MOST_SHARES = 512, 16
"""The other side is cut into at most MOST_SHARES shares, until the gradient has about BLOCKS blocks."""
Side = tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, int]
"""Tokens, offsets, sets, best matches, gradient of the scores and its stride, which is (1) for b's sets."""


def _forward(p: Problem) -> tuple[Tensor, ...]:
    found = results(p)
    if min(p.sets) > 0:
        asked = [t if there else None for t, there in zip(found, (p.from_a, p.from_b) * 2, strict=True)]
        cuda.launch("maxsim", *asked, p.a, p.b, p.cu_a, p.cu_b, smooth_of(p) or 0.0, cuda.aligned(p.a, p.b))
    return tuple(found)


def maxsim(*values: Any) -> tuple[Tensor, ...]:
    """Run the operator."""
    return _forward(Problem.of(values))


def smooth_maxsim(*values: Any) -> tuple[Tensor, ...]:
    """Run the operator."""
    return _forward(SmoothProblem.of(values))


def _sides(p: Problem, grad_a: Tensor, grad_b: Tensor, best_a: Tensor, best_b: Tensor) -> tuple[Side, Side]:
    set_a, set_b = p.set_of()
    return (
        (p.a, p.cu_a, set_a, best_a if p.from_a else None, grad_a if p.from_a else None, p.sets[1]),
        (p.b, p.cu_b, set_b, best_b if p.from_b else None, grad_b if p.from_b else None, 1),
    )


def maxsim_backward(*arguments: Any) -> tuple[Tensor, ...]:
    """Run the operator."""
    *given, needs = arguments
    p = Problem.of(given[4:])
    side_a, side_b = _sides(p, *given[:4])
    found = gradients(p, needs)
    if min(p.sets) > 0:
        for i, own, other in (0, side_a, side_b), (1, side_b, side_a):
            if found[i].numel() and other[0].shape[0]:
                found[i] = _gradient(own, other)
    return tuple(found)


def _turned(best: Tensor | None) -> Tensor | None:
    """Best matches with a set's tokens one after the other."""
    return None if best is None else best.T.contiguous()


def _both(own: Side, other: Side) -> tuple[Any, ...]:
    """Arguments of a launch: every pair of both sides' entries, the other's best matches turned."""
    (x, cu_x, set_x, best_x, grad_x, stride_x), (y, cu_y, set_y, best_y, grad_y, stride_y) = own, other
    return x, y, cu_x, cu_y, set_x, set_y, best_x, _turned(best_y), grad_x, grad_y, stride_x, stride_y


def _gradient(own: Side, other: Side) -> Tensor:
    """The gradient of the tokens of ``own``."""
    x, y = own[0], other[0]
    blocks = up(x.shape[0], TILE) * up(x.shape[1], FEATURES)
    shares = max(1, min(BLOCKS // blocks, MOST_SHARES, up(y.shape[0], TILE)))
    out = x.new_empty((shares, *x.shape), dtype=torch.float32)
    cuda.launch("maxsim_gradient", out, *_both(own, other), cuda.aligned(x, y))
    return out[0] if shares == 1 else out.sum(0)


def smooth_maxsim_backward(*arguments: Any) -> tuple[Tensor, ...]:
    """Run the operator."""
    *given, needs = arguments
    p = SmoothProblem.of(given[4:])
    sides = _sides(p, *given[:4])
    # Tokens of no set have weight 0, and 0 times what lies there must be 0.
    known = [torch.where((side[2] < k)[:, None], side[0], 0) for side, k in zip(sides, p.sets, strict=True)]
    windows = Windows(known[0], known[1], (None, None), needs, True, (TILE, TILE))
    both = _both(*sides)
    for window in windows if min(p.sets) > 0 else ():
        cuda.launch("smooth_weights", windows.dz, *both, p.smooth, *window.bounds, cuda.aligned(p.a, p.b))
    made, none = windows.finished(), gradients(p, 0)
    return tuple(m if needs & bit else n for m, n, bit in zip(made, none, p.bits.values(), strict=True))
