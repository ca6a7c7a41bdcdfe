"""The CUDA C++ kernels of late interaction: best matches in both directions from one pass, and their gradients.

The gradient of maxima is sparse and one kernel's work. Under a smooth maximum every pair of tokens has a weight:
these go through a window, whose products with the tokens are torch's, as in the contrastive losses.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastxattn.ops.contrastive.windows import Windows, up
from fastxattn.ops.late_interaction import schema
from fastxattn.ops.late_interaction.problem import Problem
from fastxattn.ops.late_interaction.schema import NEEDS
from fastxattn.runtime import cuda

TILE, FEATURES = 64, 128
"""Tokens of a tile of pairs and of a block of the gradient; features of such a block."""
BLOCKS, MOST_SHARES = 512, 16
"""The other side is cut into at most MOST_SHARES shares, until the gradient has about BLOCKS blocks."""


def supports(problem: Problem) -> str | None:
    """None when the kernels run this problem, else why not."""
    if problem.dtype == torch.float64:
        return "computes in float32; the tokens are float64"
    if torch.onnx.is_in_onnx_export():
        return "ONNX files hold late interaction as standard operators, which the reference is made of"
    return cuda.unavailable(torch.device(problem.device))


def smooth_maxsim(
    a: Tensor, b: Tensor, cu_a: Tensor, cu_b: Tensor, from_a: bool, from_b: bool, smooth: float | None
) -> tuple[Tensor, ...]:
    """As the schema says; ``smooth`` None: as ``maxsim``."""
    n, m = cu_a.shape[0] - 1, cu_b.shape[0] - 1
    kept, none = (torch.int32, -1) if smooth is None else (torch.float32, float("-inf"))
    results = [
        torch.zeros((n if wanted else 0, m), dtype=torch.float32, device=a.device) for wanted in (from_a, from_b)
    ] + [
        torch.full((x.shape[0] if wanted else 0, others), none, dtype=kept, device=a.device)
        for x, others, wanted in ((a, m, from_a), (b, n, from_b))
    ]
    if n and m:
        sum_a, sum_b, best_a, best_b = (
            t if wanted else None for t, wanted in zip(results, (from_a, from_b) * 2, strict=True)
        )
        cuda.launch(
            "maxsim", sum_a, sum_b, best_a, best_b, a, b, cu_a, cu_b, smooth or 0.0, cuda.aligned(a, b)
        )  # fmt: skip
    return tuple(results)


def maxsim(a: Tensor, b: Tensor, cu_a: Tensor, cu_b: Tensor, from_a: bool, from_b: bool) -> tuple[Tensor, ...]:
    """As the schema says."""
    return smooth_maxsim(a, b, cu_a, cu_b, from_a, from_b, None)


def _set_of(x: Tensor, cu: Tensor) -> Tensor:
    """The set of each token, and the number of sets for those past the last offset."""
    tokens = torch.arange(x.shape[0], device=x.device, dtype=torch.int32)
    return torch.bucketize(tokens, cu[1:], right=True, out_int32=True)


def maxsim_backward(
    grad_a: Tensor, grad_b: Tensor, best_a: Tensor, best_b: Tensor, a: Tensor, b: Tensor, cu_a: Tensor, cu_b: Tensor,
    from_a: bool, from_b: bool, needs: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As the schema says."""
    m = cu_b.shape[0] - 1
    side_a = (a, cu_a, _set_of(a, cu_a), best_a if from_a else None, grad_a if from_a else None, m)
    side_b = (b, cu_b, _set_of(b, cu_b), best_b if from_b else None, grad_b if from_b else None, 1)
    results = []
    for own, other, bit in (side_a, side_b, NEEDS["a"]), (side_b, side_a, NEEDS["b"]):
        x, y = own[0], other[0]
        if not needs & bit:
            results.append(x.new_empty((0, x.shape[1]), dtype=torch.float32))
        elif min(x.numel(), y.shape[0], cu_a.shape[0] - 1, m) == 0:
            results.append(x.new_zeros(x.shape, dtype=torch.float32))
        else:
            results.append(_gradient(own, other))
    return results[0], results[1]


def _gradient(own: tuple[Any, ...], other: tuple[Any, ...]) -> Tensor:
    """Of the tokens of ``own``: (tokens, cu, sets, best, gradient of scores, their stride) of both sides."""
    (x, cu_x, set_x, best_x, grad_x, stride_x), (y, cu_y, set_y, best_y, grad_y, stride_y) = own, other
    blocks = up(x.shape[0], TILE) * up(x.shape[1], FEATURES)
    shares = max(1, min(BLOCKS // blocks, MOST_SHARES, up(y.shape[0], TILE)))
    out = x.new_empty((shares, *x.shape), dtype=torch.float32)
    turned = None if best_y is None else best_y.T.contiguous()  # a set's tokens are read one after the other
    cuda.launch(
        "maxsim_gradient", out, x, y, cu_x, cu_y, set_x, set_y, best_x, turned, grad_x, grad_y, stride_x, stride_y,
        cuda.aligned(x, y),
    )  # fmt: skip
    return out[0] if shares == 1 else out.sum(0)


def smooth_maxsim_backward(
    grad_a: Tensor, grad_b: Tensor, best_a: Tensor, best_b: Tensor, a: Tensor, b: Tensor, cu_a: Tensor, cu_b: Tensor,
    from_a: bool, from_b: bool, needs: int, smooth: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As the schema says."""
    n, m = cu_a.shape[0] - 1, cu_b.shape[0] - 1
    sets = _set_of(a, cu_a), _set_of(b, cu_b)
    # Tokens of nobody have weight 0, and 0 times what lies there must be 0.
    known = [torch.where((s < k)[:, None], x, 0) for x, s, k in ((a, sets[0], n), (b, sets[1], m))]
    windows = Windows(known[0], known[1], None, None, needs, True, (TILE, TILE))
    sides = (best_a if from_a else None, best_b.T.contiguous() if from_b else None,
             grad_a if from_a else None, grad_b if from_b else None)  # fmt: skip
    for place, j, _ in windows if n and m else ():
        cuda.launch(
            "smooth_weights", windows.dz, a, b, cu_a, cu_b, *sets, *sides, m, 1, smooth, place.start, j,
            place.stop - place.start, min(windows.sides[1], b.shape[0] - j), cuda.aligned(a, b),
        )  # fmt: skip
    out_a, out_b = windows.finished()
    return out_a if needs & NEEDS["a"] else a.new_empty((0, a.shape[1]), dtype=torch.float32), (
        out_b if needs & NEEDS["b"] else b.new_empty((0, b.shape[1]), dtype=torch.float32)
    )


for _name in schema.SMOOTH:
    torch.library.impl(f"fastxattn::{_name}_cuda", "CUDA", globals()[_name])
