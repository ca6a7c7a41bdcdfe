"""Timing of calls on a GPU: what the device takes for one, without the host."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

import torch

from fastxattn.runtime.timing import Timing

_CACHE_BYTES = 1 << 28  # more than any GPU's L2 cache
_CLOCK_HZ = 2e9  # about; a delay need not be exact


def on_device(providers: Mapping[str, Callable[[], object]], *, rounds: int = 11) -> dict[str, Timing]:
    """Time every provider on the GPU in turn, ``rounds`` times over: what the device takes for one call.

    Before each call the L2 cache is overwritten, and the device is kept busy until the host has issued the whole call:
    what the host takes is no part of it (see :func:`host_seconds`).
    """
    scratch = torch.empty(_CACHE_BYTES, dtype=torch.int8, device="cuda")
    delays = {}
    for name, call in providers.items():
        call()  # compiles
        delays[name] = int((2 * host_seconds(call) + 1e-4) * _CLOCK_HZ)
    names = list(providers)
    taken: dict[str, list[float]] = {name: [] for name in names}
    for i in range(rounds):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            scratch.zero_()
            torch.cuda._sleep(delays[name])  # type: ignore[no-untyped-call]
            start.record()
            providers[name]()
            end.record()
            end.synchronize()
            taken[name].append(start.elapsed_time(end) / 1e3)
    return {name: Timing(tuple(values)) for name, values in taken.items()}


def host_seconds(call: Callable[[], object], calls: int = 5) -> float:
    """Median seconds until a call that works on the GPU has returned to the host, with nothing queued before it."""
    taken = []
    for _ in range(calls):
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        taken.append(time.perf_counter() - start)
    torch.cuda.synchronize()
    return statistics.median(taken)
