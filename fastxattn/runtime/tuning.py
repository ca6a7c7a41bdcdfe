"""Tile sizes measured on this machine's GPU, kept in a JSON file and put in front of the shipped ones."""
from __future__ import annotations
from typing import Any

def tuned(op: str, kernel: str, kind: str, dim: int, device: Any) -> Any:
    return None
