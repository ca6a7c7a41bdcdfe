"""What a backend is told of a problem before it says whether it supports it."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Problem:
    """One call of context attention."""

    device: str
    dtype: torch.dtype
    heads: int
    width: int
    bias_per_head: bool
    grad: bool
