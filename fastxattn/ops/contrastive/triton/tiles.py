"""Tile sizes of the Triton kernels, from the dtype alone; tests/offline compiles them all without a spill."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Tile:
    """One launch configuration."""

    block_m: int
    """Rows of the tile; statistics have as many columns, so that a positive's tile rounds as theirs do."""
    block_n: int
    """Columns of the tile."""
    block_k: int
    """Features of one step of a product."""
    steps: int
    """Steps after which a partial sum is added: more than one keeps the error of long float32 sums down."""
    warps: int
    """Warps per program (num_warps)."""
    stages: int
    """Software pipeline depth (num_stages)."""

    def options(self) -> dict[str, int]:
        """The launch's keyword arguments."""
        sizes = {"BLOCK_M": self.block_m, "BLOCK_N": self.block_n, "BLOCK_K": self.block_k, "STEPS": self.steps}
        return sizes | {"num_warps": self.warps, "num_stages": self.stages}


_HALF = {"stats": Tile(64, 64, 64, 1, 8, 4), "slope": Tile(64, 64, 64, 1, 8, 4)}
_SINGLE = {"stats": Tile(32, 32, 32, 4, 8, 1), "slope": Tile(32, 32, 32, 4, 8, 1)}
_POSITIVE = Tile(32, 32, 64, 1, 4, 1)
LIKE = {"stats": "stats", "blocked": "stats", "slope": "slope", "sigmoid": "slope", "positive": "positive"}
"""Which tile each kernel launches with."""

PROGRAMS, MOST_SPLITS = 512, 16


def pick(kernel: str, dtype: torch.dtype) -> Tile:
    """The shipped tile of ``kernel``."""
    return _POSITIVE if kernel == "positive" else (_SINGLE if dtype == torch.float32 else _HALF)[kernel]


def splits(row_blocks: int, column_blocks: int) -> int:
    """Into how many shares the columns are cut, so that few rows still fill a device; decided by shapes alone."""
    return max(1, min(PROGRAMS // row_blocks, MOST_SPLITS, column_blocks))
