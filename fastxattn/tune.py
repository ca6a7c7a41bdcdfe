"""Measure tile sizes of the Triton kernels on this machine's GPU and write the fastest to the tuning cache.

:func:`run` is what ``fastxattn tune`` calls. From the shipped tile it steps to the neighbour that is fastest (half or
twice either block, other warps, one pipeline stage more or less) until none is faster, and stores the result in
:func:`fastxattn.runtime.tuning.cache_path` for every later process. A tile changes speed, never a result's meaning.
"""

from __future__ import annotations

import importlib.util
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from fastxattn.ops.attention.operator import BACKWARD, FORWARD
from fastxattn.ops.attention.problem import Problem
from fastxattn.ops.attention.triton import tiles
from fastxattn.ops.co_attention import operator as co_attention
from fastxattn.ops.co_attention import problem as co_attention_problem
from fastxattn.ops.importance import operator as importance
from fastxattn.ops.importance import problem as importance_problem
from fastxattn.runtime import tuning

Tile = tuple[int, int, int, int]
Call = Callable[[], object]
STEPS = 3
"""From the shipped tile, at most."""
_TARGETS = {
    "backward_query": Problem.bits["query"],
    "backward_key": Problem.bits["key"] + Problem.bits["value"],
    "backward_bias": Problem.bits["bias"],
}


def keys(kernels: tuple[str, ...] = (), dims: tuple[int, ...] = ()) -> list[tuple[str, Tile]]:
    """(op.kernel.kind.dim, shipped tile) of everything that can be tuned, or of the kernels and head dims named."""
    found = [(f"attention.{k}.{kind}.{dim}", tile) for k, kind, dim, tile in tiles.shipped()]
    for kernel, table in _other_tiles().items():
        found += [(f"{kernel}.{kind}.{dim}", tile) for kind, row in table.items() for dim, tile in row.items()]
    known = sorted({key.rsplit(".", 2)[0] for key, _ in found})
    for kernel in kernels:
        if kernel not in known:
            raise ValueError(f"kernel must be one of {', '.join(known)}; got {kernel!r}")
    return [
        (key, (tile.block_m, tile.block_n, tile.warps, tile.stages))
        for key, tile in found
        if (not kernels or key.rsplit(".", 2)[0] in kernels) and (not dims or int(key.rsplit(".", 1)[1]) in dims)
    ]


def _other_tiles() -> dict[str, dict[str, dict[int, tiles.Tile]]]:
    """Tables of the kernels besides attention's: op.kernel -> kind -> widest head dim -> tile."""
    if importlib.util.find_spec("triton") is None:
        raise RuntimeError("tune: Triton is not installed, so there are no tiles to measure")
    from fastxattn.ops.co_attention import kernels_triton as co_attention_kernels
    from fastxattn.ops.importance import kernels_triton as importance_kernels

    return {"importance.importance": importance_kernels.TILES, "co_attention.backward": co_attention_kernels.TILES}


def neighbours(tile: Tile) -> Iterator[Tile]:
    """Tiles one step away."""
    m, n, warps, stages = tile
    for block_m in (m // 2, m * 2):
        if block_m in tuning.BLOCKS:
            yield block_m, n, warps, stages
    for block_n in (n // 2, n * 2):
        if block_n in tuning.BLOCKS:
            yield m, block_n, warps, stages
    yield m, n, 4 if warps == 8 else 8, stages
    for depth in (stages - 1, stages + 1):
        if 1 <= depth <= 4:
            yield m, n, warps, depth


def problem_of(kernel: str, kind: str, dim: int, device: str) -> Problem:
    """A problem that ``kernel`` runs, of the kind the table calls ``kind``."""
    dtype = torch.float32 if kind.startswith("single") else torch.bfloat16
    few = kernel == "split"
    batch, queries, keys_ = (16, 32, 4096) if few else (16, 512, 512)
    g = torch.Generator(device).manual_seed(0)
    query = torch.randn(batch * queries, 8, dim, generator=g, device=device).to(dtype)
    key, value = (torch.randn(batch * keys_, 8, dim, generator=g, device=device).to(dtype) for _ in range(2))
    offsets_q, offsets_k = (
        torch.arange(0, (batch + 1) * n, n, dtype=torch.int32, device=device) for n in (queries, keys_)
    )
    problem = Problem(
        query=query, key=key, value=value, cu_seqlens_q=offsets_q, cu_seqlens_k=offsets_k, scale=dim**-0.5
    )
    if kind.endswith("rich"):
        problem = problem.replace(key_bias=torch.zeros(key.shape[0], dtype=torch.float32, device=device))
    if kernel == "backward_bias":
        problem = problem.replace(bias=torch.zeros(1, 8, queries, keys_, dtype=dtype, device=device))
    return problem


def call_of(key: str, device: str) -> Call:
    """The operator call that is timed for a key: that kernel does the work in it that depends on the tile."""
    op, kernel, kind, dim = key.split(".")
    problem = problem_of(kernel, kind, int(dim), device)
    q, k, v, offsets = problem.query, problem.key, problem.value, problem.cu_seqlens_q
    if op != "attention":
        lse = torch.full((8, q.shape[0]), 6.0, dtype=torch.float32, device=device)
    if op == "importance":
        scored = importance_problem.Problem(
            query=q, key=k, lse=lse, cu_seqlens_q=offsets, cu_seqlens_k=problem.cu_seqlens_k, scale=problem.scale
        )
        return lambda: importance.FORWARD["triton"](*scored.values())
    if op == "co_attention":
        both = co_attention_problem.Problem(
            query_a=q,
            query_b=k,
            value_a=v,
            value_b=v,
            cu_seqlens_a=offsets,
            cu_seqlens_b=offsets,
            scale=problem.scale,
        )
        needs = sum(both.bits[name] for name in ("query_a", "query_b", "value_a", "value_b"))
        return lambda: co_attention.BACKWARD["triton"](q, k, v, v, lse, lse, *both.values(), needs)
    if kernel in ("forward", "split"):
        return lambda: FORWARD["triton"](*problem.values())
    out, lse = FORWARD["triton"](*problem.values())
    return lambda: BACKWARD["triton"](out, None, out, lse, *problem.values(), _TARGETS[kernel])


def milliseconds(call: Call, rounds: int = 20) -> float:
    """Median device time of a call."""
    for _ in range(3):
        call()
    times = []
    for _ in range(rounds):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def run(kernels: tuple[str, ...] = (), dims: tuple[int, ...] = (), report: Callable[[str], object] = print) -> Path:
    """Tune every shipped configuration, or those of the named ``op.kernel`` and head dims; returns the cache's path.

    Raises:
        ValueError: there is no such kernel.
        RuntimeError: there is no GPU here, or nothing ran on it.
    """
    todo = keys(kernels, dims)
    if not torch.cuda.is_available():
        raise RuntimeError("tune: no CUDA or ROCm device is visible to torch here; tiles are measured, not guessed")
    name = torch.cuda.get_device_name()
    for key, shipped in todo:
        call = call_of(key, "cuda")
        times: dict[Tile, float] = {}

        def measure(tile: Tile, key: str = key, call: Call = call, times: dict[Tile, float] = times) -> float:
            if tile not in times:
                with tuning.trying(key, tile):
                    times[tile] = milliseconds(call)
            return times[tile]

        best = shipped
        for _ in range(STEPS):
            before, best = best, tuning.tune(key, (best, *neighbours(best)), measure, name)
            if best == before:
                break
        report(f"{key}: {best}, {times[best]:.3f} ms (shipped {shipped}: {times.get(shipped, float('nan')):.3f} ms)")
    return tuning.cache_path()
