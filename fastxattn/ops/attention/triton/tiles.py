"""Tile sizes of the Triton attention kernels, from the problem and the architecture alone.

A shipped configuration is one that tests/offline compiles for every architecture without a spill. The tables are short
on purpose: three head-dim classes x four kinds of problem. ``fastxattn.runtime.tuning`` may put better
ones, measured on a machine that has the GPU, in front of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

KERNELS = ("forward", "split", "backward_query", "backward_key", "backward_bias")


@dataclass(frozen=True)
class Tile:
    """One launch configuration."""

    block_m: int
    """Rows (query x head of the group) per tile."""
    block_n: int
    """Keys per tile."""
    warps: int
    """Warps per program (num_warps)."""
    stages: int
    """Software pipeline depth (num_stages)."""


Table = dict[str, dict[int, Tile]]  # kernel -> widest padded head dim -> tile

_PLAIN: Table = {
    "forward": {64: Tile(128, 64, 4, 3), 128: Tile(64, 64, 4, 3), 256: Tile(64, 32, 4, 2)},
    "split": {64: Tile(32, 64, 4, 3), 128: Tile(32, 64, 4, 2), 256: Tile(32, 32, 4, 2)},
    "backward_query": {64: Tile(64, 64, 4, 2), 128: Tile(64, 32, 4, 2), 256: Tile(64, 16, 4, 1)},
    "backward_key": {64: Tile(32, 64, 4, 1), 128: Tile(32, 64, 4, 1), 256: Tile(32, 32, 4, 1)},
}
_RICH: Table = {
    "forward": {64: Tile(64, 32, 8, 1), 128: Tile(32, 32, 4, 1), 256: Tile(16, 32, 8, 1)},
    "split": {64: Tile(16, 64, 4, 1), 128: Tile(16, 32, 4, 1), 256: Tile(16, 16, 4, 1)},
    "backward_query": {64: Tile(32, 32, 4, 1), 128: Tile(16, 32, 4, 1), 256: Tile(16, 16, 8, 1)},
    "backward_key": {64: Tile(16, 32, 4, 1), 128: Tile(16, 16, 4, 1), 256: Tile(16, 16, 8, 1)},
    "backward_bias": {64: Tile(64, 32, 8, 1), 128: Tile(32, 32, 8, 1), 256: Tile(16, 32, 8, 1)},
}
# Exact float32 runs on the ordinary arithmetic units, whose operands live in registers.
_SINGLE: Table = {
    "forward": {64: Tile(32, 16, 8, 1), 128: Tile(16, 16, 8, 1), 256: Tile(16, 16, 8, 1)},
    "split": {64: Tile(16, 16, 8, 1), 128: Tile(16, 16, 8, 1), 256: Tile(16, 16, 8, 2)},
    "backward_query": {64: Tile(16, 16, 8, 1), 128: Tile(32, 16, 8, 1), 256: Tile(16, 16, 8, 1)},
    "backward_key": {64: Tile(32, 16, 8, 1), 128: Tile(16, 16, 8, 1), 256: Tile(16, 16, 8, 1)},
}
_SINGLE_RICH: Table = {kernel: dict.fromkeys((64, 128, 256), Tile(16, 16, 8, 1)) for kernel in KERNELS}
# What would spill on compute capability 8.
_AMPERE: Table = {
    "forward": {64: Tile(128, 64, 4, 3), 128: Tile(64, 32, 4, 2), 256: Tile(64, 32, 8, 2)},
    "backward_query": {64: Tile(64, 64, 4, 2), 128: Tile(64, 32, 4, 2), 256: Tile(16, 16, 8, 1)},
}
_TABLES = {"plain": _PLAIN, "rich": _RICH, "single": _SINGLE, "single_rich": _SINGLE_RICH}

MERGE_WARPS = 8
"""Warps of the merge of chunks, which has the tile of the split."""
SPLIT_KEYS = 512
"""Keys per chunk of the split-KV schedule; a sequence longer than MAX_SPLITS of them gets longer chunks."""
MAX_SPLITS = 32
SPLIT_QUERIES = 64
"""The split-KV schedule is for at most this many rows (queries x group) per sequence on average..."""
SPLIT_LENGTH = 1024
"""...and at least this many keys per sequence on average."""


def padded_dim(dim: int) -> int:
    """Head dims are padded to a power of two inside the kernel, 16 at least (the matrix units' depth)."""
    return max(16, 1 << (dim - 1).bit_length())


def kind_of(itemsize: int, rich: bool) -> str:
    """Which table: ``plain``, ``rich`` with a range, a bias or dropout; in float32 ``single`` and ``single_rich``."""
    if itemsize == 4:
        return "single_rich" if rich else "single"
    return "rich" if rich else "plain"


def pick(kernel: str, kind: str, dim: int, ampere: bool = False) -> Tile:
    """The shipped tile of ``kernel`` for padded head dims up to ``dim``; ``ampere``: on compute capability 8."""
    return tables(ampere)[kind][kernel][max(64, dim)]


def tables(ampere: bool) -> dict[str, Table]:
    """The tiles of every kind of problem."""
    return _TABLES | {"plain": _PLAIN | _AMPERE} if ampere else _TABLES


def warps_on(tile: Tile, itemsize: int, rocm: bool) -> int:
    """Warps to launch with: on ROCm for float32 and for tiles of 16 x 16 four at most.

    That is one to a SIMD unit, which leaves each all of its registers; matrix units split such tiles no further.
    """
    return min(tile.warps, 4) if rocm and (itemsize == 4 or tile.block_m * tile.block_n <= 256) else tile.warps


def shipped(ampere: bool = False) -> list[tuple[str, str, int, Tile]]:
    """Every (kernel, kind, widest head dim, tile), for the offline gates and the tuner."""
    every = tables(ampere).items()
    return [(k, kind, dim, tile) for kind, t in every for k, row in t.items() for dim, tile in row.items()]


def splits_for(slots_q: int, slots_k: int, batch: int, group: int) -> int:
    """Chunks of keys per sequence: 1, or what the longest possible sequence may need.

    Decided by shapes alone. A chunk's size depends on its own sequence only, so within a schedule a sequence's result
    does not depend on its neighbours; which of the two schedules runs depends on the averages of the batch. Under
    ``torch.use_deterministic_algorithms(True)`` keys are never cut, and a sequence has the same bits in every batch.
    """
    if torch.are_deterministic_algorithms_enabled():
        return 1
    if slots_q * group > SPLIT_QUERIES * batch or slots_k < SPLIT_LENGTH * batch:
        return 1
    return min(MAX_SPLITS, -(-slots_k // SPLIT_KEYS))
