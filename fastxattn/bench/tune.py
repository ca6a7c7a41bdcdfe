"""Measures tiles of the Triton attention kernels on this machine's GPU: ``fastxattn tune``.

A candidate is timed through the public function, with the candidate alone in the tuning cache, so that what is measured
is what a later process runs.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import torch

from fastxattn.runtime import tuning

Tile = tuple[int, int, int, int]
ROUNDS = 20


def require_gpu() -> None:
    """Refuse to go on without a GPU that Triton can use.

    Raises:
        RuntimeError: torch sees no GPU, or Triton is missing.
    """
    if not torch.cuda.is_available():
        raise RuntimeError("tune needs a GPU: torch sees no CUDA or ROCm device here, and CPU kernels need no tuning")
    try:
        import triton  # noqa: F401
    except ImportError as error:
        raise RuntimeError("tune needs Triton: pip install 'fastxattn[triton]'") from error


def candidates(shipped: Tile) -> list[Tile]:
    """The shipped tile first, then its neighbours: each block halved or doubled, 4 or 8 warps, 1 to 3 stages."""
    block_m, block_n, warps, stages = shipped
    sides = [[n for n in (side, side // 2, side * 2) if 16 <= n <= 128] for side in (block_m, block_n)]
    near = product(*sides, (warps, 12 - warps), (stages, *(n for n in (1, 2, 3) if n != stages)))
    return list(near)


@contextlib.contextmanager
def only(key: str, tile: Tile, device_name: str) -> Iterator[None]:
    """Run with one tile in the cache and nothing else."""
    before = os.environ.get("FASTXATTN_TUNING")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tuning.json"
        path.write_text(json.dumps({device_name: {key: list(tile)}}))
        os.environ["FASTXATTN_TUNING"] = str(path)
        tuning._cache.cache_clear()
        try:
            yield
        finally:
            if before is None:
                del os.environ["FASTXATTN_TUNING"]
            else:
                os.environ["FASTXATTN_TUNING"] = before
            tuning._cache.cache_clear()


def workload(kernel: str, kind: str, dim: int) -> Callable[[], object]:
    """A call that spends its time in ``kernel`` with the tile of (``kind``, ``dim``)."""
    import fastxattn

    dtype = torch.float32 if kind == "single" else torch.bfloat16
    queries, keys = ((1,) * 16, (4096,) * 16) if kernel == "split" else ((77, 5, 40, 256) * 8, (577, 1024, 64, 257) * 8)
    grad = kernel.startswith("backward")

    def rows(lengths: Sequence[int]) -> torch.Tensor:
        return torch.randn(sum(lengths), 16, dim, device="cuda", dtype=dtype, requires_grad=grad)

    query, key, value = rows(queries), rows(keys), rows(keys)
    cu_q, cu_k = (
        torch.tensor([0, *n], device="cuda").cumsum(0).to(torch.int32)
        for n in (queries, keys)
    )  # fmt: skip
    options: dict[str, Any] = {"backend": "triton"}
    if kind == "rich":
        options["kv_range"] = fastxattn.ranges.causal_kv_range(cu_q, cu_k, total_q=sum(queries))

    def run() -> object:
        out = fastxattn.varlen_cross_attention(query, key, value, cu_q, cu_k, max(queries), max(keys), **options)
        return torch.autograd.grad(out, (query, key, value), torch.ones_like(out)) if grad else out

    return run


def seconds(run: Callable[[], object]) -> float:
    """Median device time of one call."""
    run()
    times = []
    for _ in range(ROUNDS):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()  # type: ignore[no-untyped-call]
        run()
        end.record()  # type: ignore[no-untyped-call]
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times)


def tune_attention(kernels: Sequence[str], dims: Sequence[int], say: Callable[[str], None]) -> dict[str, Tile]:
    """Tune the named kernels and head dims (all when none is named); keys and tiles chosen.

    Raises:
        ValueError: nothing has such a name.
        RuntimeError: no GPU.
    """
    from fastxattn.ops.attention.triton import config

    wanted = [
        (kernel, kind, dim, tile)
        for kernel, kind, dim, tile in config.shipped()
        if kernel != "backward_bias" and kernel in (kernels or config.KERNELS) and dim in (dims or (64, 128, 256))
    ]
    if not wanted:
        raise ValueError(f"no kernel is called {list(kernels)} with head dim {list(dims)}; got nothing to tune")
    require_gpu()
    name, found = torch.cuda.get_device_name(), {}
    for place, (kernel, kind, dim, tile) in enumerate(wanted):
        key = f"attention.{kernel}.{kind}.{dim}"
        run = workload(kernel, kind, dim)

        def measure(candidate: Tile, key: str = key, run: Callable[[], object] = run, place: int = place) -> float:
            say(f"{place + 1} of {len(wanted)}: {key} {candidate}")
            with only(key, candidate, name):
                return seconds(run)

        shipped = (tile.block_m, tile.block_n, tile.warps, tile.stages)
        found[key] = tuning.tune(key, candidates(shipped), measure, name)
    return found
