"""Tile sizes of the Triton key-importance kernel."""

from __future__ import annotations

from fastxattn.ops.attention.triton.config import Tile

TILES = {
    "half": {64: Tile(64, 64, 4, 2), 128: Tile(64, 32, 4, 2), 256: Tile(64, 32, 4, 2)},
    "single": {64: Tile(32, 32, 4, 1), 128: Tile(32, 32, 8, 1), 256: Tile(32, 16, 8, 1)},
}


def shipped() -> list[tuple[str, int, Tile]]:
    """Every (kind, widest head dim, tile)."""
    return [(kind, dim, tile) for kind, table in TILES.items() for dim, tile in table.items()]
