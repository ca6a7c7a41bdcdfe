"""Tile sizes measured on this machine's GPU, kept in a JSON file and put in front of the shipped ones."""

from __future__ import annotations
from typing import Any
from torch import Tensor


def tuned(op: str, kernel: str, like: Tensor, dim: int) -> Any:
    return None
