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

from fastxattn.ops.co_attention import schema  # noqa: F401  (defines the operators)
from fastxattn.ops.co_attention.problem import CoAttentionProblem


def pays(problem: CoAttentionProblem) -> bool:
    """Whether the kernel of this room is used rather than two calls of attention.

    Not yet: on an H200 two calls took 0.57 to 0.77 of its time at every size (docs/design/gpu.md). It remains for
    devices where products cost more, and for tiles that nobody has tried.
    """
    return False


def _forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from fastxattn.ops.co_attention.triton_kernel import co_attention_forward

    return co_attention_forward(CoAttentionProblem(*arguments))


def _backward(*arguments: Any) -> tuple[Tensor, ...]:
    from fastxattn.ops.co_attention.triton_kernel import co_attention_backward

    *results, needs = arguments
    return co_attention_backward(tuple(results[:6]), CoAttentionProblem(*results[6:]), needs)


for _key in ("CUDA", "CPU"):  # on CPU tensors: the interpreter
    torch.library.impl("fastxattn::co_attention_triton", _key, _forward)
    torch.library.impl("fastxattn::co_attention_backward_triton", _key, _backward)
