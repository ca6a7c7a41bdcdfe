"""Tile sizes measured on this machine's GPU, kept in a JSON file and put in front of the shipped ones.

Nothing is tuned at a first call. :func:`tune` measures candidates where somebody asks for it and writes the cache; a
later process reads it once. The file is ``$FASTXATTN_TUNING`` or ``~/.cache/fastxattn/tuning.json``::

    {"NVIDIA H100 80GB HBM3": {"attention.forward.plain.64": [128, 64, 4, 3], "attention.backend.plain.64": "cuda"}}

A tile only changes speed, so nonsense in the file costs one warning and no call: entries that are not valid are ignored
and the others used. Processes may tune at once: a write merges its entry into the file under a lock and replaces the
file in one step.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import uuid
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import torch

from fastxattn.runtime import env

BLOCKS = (16, 32, 64, 128)
"""Sizes that a tile's blocks may have."""
WARPS = (1, 2, 4, 8, 16)
STAGES = range(1, 9)
LARGEST_FILE = 1 << 20
"""Bytes; one GPU's entries take about 4 kB."""

Entries = dict[str, dict[str, list[int] | str]]
_P = ParamSpec("_P")
_R = TypeVar("_R")
_trials: dict[str, tuple[int, int, int, int]] = {}
_in_use = True


def cache_path() -> Path:
    """Where the cache lies."""
    chosen = os.environ.get("FASTXATTN_TUNING", "")
    return Path(chosen) if chosen else Path.home() / ".cache/fastxattn/tuning.json"


@functools.cache
def _cache() -> Entries:
    if not _in_use:
        return {}
    try:
        path = cache_path()
    except RuntimeError:  # this user has no home, so nothing was ever tuned
        return {}
    entries, faults = _read(path)
    if faults:
        more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
        warnings.warn(
            f"fastxattn: ignoring the tuning cache {path}, or its entries that are not valid: {faults[0]}{more}",
            stacklevel=3,
        )
    return entries


def _read(path: Path) -> tuple[Entries, list[str]]:
    """The valid entries of a cache file, and what is wrong with the others."""
    try:
        if not path.exists():
            return {}, []
        if not path.is_file():
            return {}, ["it is not a file"]
        with path.open("rb") as file:
            data = file.read(LARGEST_FILE + 1)
        if len(data) > LARGEST_FILE:
            return {}, [f"it is larger than {LARGEST_FILE} bytes"]
        content = json.loads(data.decode("utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        return {}, [f"{type(error).__name__}: {error}"]
    if not isinstance(content, dict):
        return {}, [f"it holds a {type(content).__name__}, not an object of devices"]
    entries: Entries = {}
    faults = []
    for device, values in content.items():
        if not isinstance(values, dict):
            faults.append(f"{_short(device)}: a {type(values).__name__}, not an object of entries")
            continue
        entries[device] = {}
        for key, value in values.items():
            if fault := _fault(key, value):
                faults.append(f"{_short(device)}: {_short(key)}: {fault}")
            else:
                entries[device][key] = value
    return entries, faults


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _fault(key: str, value: object) -> str | None:
    """Why this is not an entry that a launch can take; None when it is one."""
    if ".backend." in key:
        known = isinstance(value, str) and value in env.BACKENDS and value != "auto"
        return None if known else f"{_short(value)} is not the name of a backend"
    if not isinstance(value, list) or len(value) != 4 or any(type(n) is not int for n in value):
        return f"{_short(value)} is not [block_m, block_n, warps, stages]"
    block_m, block_n, warps, stages = value
    if block_m not in BLOCKS or block_n not in BLOCKS:
        return f"{_short(value)}: blocks must be one of {', '.join(map(str, BLOCKS))}"
    if warps not in WARPS or stages not in STAGES:
        return f"{_short(value)}: warps must be one of {', '.join(map(str, WARPS))}, stages 1 to {STAGES[-1]}"
    return None


def or_shipped(launch: Callable[_P, _R]) -> Callable[_P, _R]:
    """Launch again with the shipped tiles when Triton refuses a tile of the cache (too much shared memory, say).

    The cache is then ignored for the rest of the process, with one warning.
    """

    @functools.wraps(launch)
    def launched(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        global _in_use
        try:
            return launch(*args, **kwargs)
        except Exception as error:
            # Within trying() the tuner must see the error; without tiles of the cache the shipped one was refused.
            if _trials or not _cache() or not type(error).__module__.startswith("triton"):
                raise
            warnings.warn(
                f"fastxattn: ignoring the tuning cache {cache_path()}: a tile in it does not run here: {error}",
                stacklevel=2,
            )
        _in_use = False
        _cache.cache_clear()
        return launch(*args, **kwargs)

    return launched


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


def preferred(op: str, kind: str, dim: int, device: torch.device) -> str | None:
    """The backend that was measured to be the fastest for this kind of problem, or None where nobody measured."""
    found = _cache().get(_device_name(device), {}).get(f"{op}.backend.{kind}.{dim}") if _cache() else None
    return found if isinstance(found, str) else None


def prefer(op: str, kind: str, dim: int, seconds: Mapping[str, float], device_name: str) -> str:
    """Write down the fastest of the measured backends, which ``backend="auto"`` will try first, and return it."""
    best = min(seconds, key=lambda name: seconds[name])
    _write(device_name, f"{op}.backend.{kind}.{dim}", best)
    return best


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
    _write(device_name, key, list(best))
    return best


def _write(device_name: str, key: str, value: list[int] | str) -> None:
    """Merge one entry into what the file holds by now."""
    if fault := _fault(key, value):
        raise ValueError(f"the tuning cache takes no such entry: {key}: {fault}")
    path = cache_path().resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    with _locked(path):
        content, faults = _read(path)
        if faults and path.is_file():  # it may be another program's file that FASTXATTN_TUNING names by mistake
            path.replace(path.with_name(f"{path.name}.invalid"))
        content.setdefault(device_name, {})[key] = value
        fresh = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
        try:
            fresh.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n", encoding="utf-8")
            fresh.replace(path)
        finally:
            fresh.unlink(missing_ok=True)
    _cache.cache_clear()


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the lock of a file against other threads and processes; without effect where there are no file locks."""
    with path.with_name(f".{path.name}.lock").open("a") as lock:
        with contextlib.suppress(ImportError, OSError):
            import fcntl

            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
