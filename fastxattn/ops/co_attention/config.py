"""Tile sizes of the Triton co-attention backward kernel."""

from __future__ import annotations

from fastxattn.ops.attention.triton.config import Tile

TILES = {
    "half": {64: Tile(32, 32, 4, 1), 128: Tile(16, 32, 4, 1), 256: Tile(16, 16, 8, 1)},
    "single": {64: Tile(16, 16, 8, 1), 128: Tile(16, 16, 8, 1)},  # wider ones go one direction after the other
}


def shipped() -> list[tuple[str, int, Tile]]:
    """Every (kind, widest head dim, tile)."""
    return [(kind, dim, tile) for kind, table in TILES.items() for dim, tile in table.items()]
