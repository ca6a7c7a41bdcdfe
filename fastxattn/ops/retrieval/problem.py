"""The arguments of a search, once for every backend."""

from __future__ import annotations

from torch import Tensor

from fastxattn.ops.arguments import Arguments, problem


@problem
class Problem(Arguments):
    """The best ``k`` rows of a corpus for every query."""

    queries: Tensor  # (Q, D) float32, or float64 on the reference backend
    corpus: Tensor  # (R, D) float32, bfloat16, float16 or int8; float64 on the reference backend
    factor: Tensor | None = None  # (R,) multiplies a row's scores, in the dtype of the queries
    k: int
    first: int = 0  # added to row indices: the corpus may be part of a larger one
