"""Small inputs that tests and benchmarks need."""

from __future__ import annotations

from collections.abc import Iterable

import torch


def offsets(lengths: Iterable[int]) -> torch.Tensor:
    """(batch + 1,) int32: where sequences of these lengths begin and end, one after the other."""
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
