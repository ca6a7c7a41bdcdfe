"""The arguments of late interaction, once for every backend."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from fastxattn.ops.arguments import Arguments, differentiable, problem


@problem
class Problem(Arguments):
    """Scores of every set of ``a``'s tokens against every set of ``b``'s: sums of best matches."""

    operator: ClassVar[str] = "maxsim"

    a: Tensor = differentiable()  # (Ta, D)
    b: Tensor = differentiable()  # (Tb, D)
    cu_a: Tensor  # (N + 1,) int32, where each set starts
    cu_b: Tensor  # (M + 1,) int32
    from_a: bool = True  # sums over the tokens of a
    from_b: bool = True  # sums over the tokens of b

    @property
    def sets(self) -> tuple[int, int]:
        """How many sets there are on each side."""
        return self.cu_a.shape[0] - 1, self.cu_b.shape[0] - 1

    def set_of(self) -> tuple[Tensor, Tensor]:
        """The set of each token on both sides; the number of sets for tokens past the last offset."""

        def find(x: Tensor, cu: Tensor) -> Tensor:
            tokens = torch.arange(x.shape[0], device=x.device, dtype=torch.int32)
            return torch.bucketize(tokens, cu[1:], right=True, out_int32=True)

        return find(self.a, self.cu_a), find(self.b, self.cu_b)


@problem
class SmoothProblem(Problem):
    """The same with a smooth maximum, ``smooth * logsumexp(. / smooth)``."""

    operator: ClassVar[str] = "smooth_maxsim"

    smooth: float


def smooth_of(p: Problem) -> float | None:
    """The temperature of a smooth maximum, None for the maximum."""
    return p.smooth if isinstance(p, SmoothProblem) else None
