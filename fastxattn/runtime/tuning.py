"""Tile sizes measured on this machine's GPU, kept in a JSON file and put in front of the shipped ones.

Nothing is tuned at a first call. :func:`tune` measures candidates where somebody asks for it and writes the cache; a
later process reads it once. The file is ``$FASTXATTN_TUNING`` or ``~/.cache/fastxattn/tuning.json``::

    {"NVIDIA H100 80GB HBM3": {"attention.forward.plain.64": [128, 64, 4, 3]}}

A file that cannot be read or holds anything else is ignored with a warning: a tile only changes speed.
"""

from __future__ import annotations

import functools
import json
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

_trials: dict[str, tuple[int, int, int, int]] = {}


def cache_path() -> Path:
    """Where the cache lies."""
    chosen = os.environ.get("FASTXATTN_TUNING", "")
    return Path(chosen) if chosen else Path.home() / ".cache/fastxattn/tuning.json"


@functools.cache
def _cache() -> dict[str, dict[str, list[int]]]:
    path = cache_path()
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text())
        for tiles in content.values():
            for tile in tiles.values():
                if len(tile) != 4 or not all(isinstance(n, int) and n > 0 for n in tile):
                    raise ValueError(f"{tile} is not [block_m, block_n, warps, stages]")
    except (OSError, ValueError, AttributeError, TypeError) as error:
        warnings.warn(f"fastxattn: ignoring the tuning cache {path}: {error}", stacklevel=3)
        return {}
    return dict(content)


@functools.cache
def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" and torch.cuda.is_available() else device.type


def tuned(op: str, kernel: str, kind: str, dim: int, device: torch.device, tile: Callable[..., Any]) -> Any:
    """The tile this machine was tuned to, made by ``tile(block_m, block_n, warps, stages)``, or None."""
    if not _trials and not _cache():
        return None
    key = f"{op}.{kernel}.{kind}.{dim}"
    found = _trials.get(key) or _cache().get(_device_name(device), {}).get(key)
    return tile(*found) if found is not None else None


@contextmanager
def trying(key: str, tile: tuple[int, int, int, int]) -> Iterator[None]:
    """Within this block launches for ``key`` take ``tile``, whatever the cache says."""
    _trials[key] = tile
    try:
        yield
    finally:
        del _trials[key]


def tune(
    key: str,
    candidates: Iterable[tuple[int, int, int, int]],
    measure: Callable[[tuple[int, int, int, int]], float],
    device_name: str,
) -> tuple[int, int, int, int]:
    """Measure candidates for one key (``op.kernel.kind.dim``), write the fastest to the cache, and return it.

    Args:
        key: what the tile is for.
        candidates: (block_m, block_n, warps, stages) each.
        measure: seconds of one candidate; one that does not compile or fit raises and is passed over.
        device_name: as ``torch.cuda.get_device_name`` says it.

    Raises:
        RuntimeError: no candidate ran.
    """
    times: dict[tuple[int, int, int, int], float] = {}
    faults: list[str] = []
    for candidate in candidates:
        try:
            times[candidate] = measure(candidate)
        except Exception as error:  # whatever a compiler or launcher raises
            faults.append(f"{candidate}: {error}")
    if not times:
        raise RuntimeError(f"no tile for {key} ran on {device_name}: {'; '.join(faults) or 'no candidates'}")
    best = min(times, key=lambda tile: times[tile])
    content = {name: dict(tiles) for name, tiles in _cache().items()}
    content.setdefault(device_name, {})[key] = list(best)
    path = cache_path()
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_suffix(".tmp")
    fresh.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n")
    fresh.replace(path)
    _cache.cache_clear()
    return best
