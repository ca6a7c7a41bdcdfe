"""Key importance in Triton: a block of keys stays, the queries pass by, weights are summed along the queries."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastxattn.ops.attention import triton as attention
from fastxattn.ops.importance import schema  # noqa: F401  (defines the operator)
from fastxattn.ops.importance.problem import ImportanceProblem


def supports(problem: ImportanceProblem) -> str | None:
    """None when the kernel runs this problem, else the reason why not: the same as attention's."""
    return attention.supports(problem.attention())


def _importance(*arguments: Any) -> Tensor:
    from fastxattn.ops.importance.triton_kernel import launch

    return launch(ImportanceProblem(*arguments))


for _key in ("CUDA", "CPU"):
    torch.library.impl("fastxattn::importance_triton", _key, _importance)
