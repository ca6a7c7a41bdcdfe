"""Co-attention in Triton: two attention forwards, and a backward pass that shares the scores.

One forward pass over the scores would save one product of four, but the programs that own rows of one side would have
to leave partial sums of the other in memory: for every 128 rows as many bytes as the product saves in time on no GPU
that was considered (docs/design/triton.md). Backward needs no such sums: a program owns rows of one side, meets
all of the other, and computes both directions' share of its own rows from one tile of scores, so that two launches
with the sides swapped make ten products where four launches made fourteen.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastxattn.ops.bidirectional import schema  # noqa: F401  (defines the operators)
from fastxattn.ops.bidirectional.problem import BidirectionalProblem


def pays(problem: BidirectionalProblem) -> bool:
    """Whether the kernel of this room is used rather than two calls of attention.

    Not yet: on an H200 two calls took 0.57 to 0.77 of its time at every size (docs/design/gpu.md). It remains for
    devices where products cost more, and for tiles that nobody has tried.
    """
    return False


def _forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from fastxattn.ops.bidirectional.triton_kernel import bidirectional_forward

    return bidirectional_forward(BidirectionalProblem(*arguments))


def _backward(*arguments: Any) -> tuple[Tensor, ...]:
    from fastxattn.ops.bidirectional.triton_kernel import bidirectional_backward

    *results, needs = arguments
    return bidirectional_backward(tuple(results[:6]), BidirectionalProblem(*results[6:]), needs)


for _key in ("CUDA", "CPU"):  # on CPU tensors: the interpreter
    torch.library.impl("fastxattn::bidirectional_triton", _key, _forward)
    torch.library.impl("fastxattn::bidirectional_backward_triton", _key, _backward)
