"""Peak extra memory of a call, as the operating system (or CUDA) saw it."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path

import torch

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


def peak_extra_bytes(call: Callable[[], object], *, warm: bool = False) -> int | None:
    """Bytes that ``call`` needed at its worst moment beyond what was in use before it; None where unknown.

    On Linux the kernel's high-water mark of resident memory is reset and read back, which also sees memory that
    compiled libraries allocate for themselves. glibc is told to hand memory back rather than to keep it, or an earlier
    call's memory would hide this one's; a first call warms caches that are not the call's own, unless ``warm`` says
    that there was one.
    """
    if not warm:
        call()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return int(torch.cuda.max_memory_allocated() - before)
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    try:
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(_M_MMAP_THRESHOLD, 1 << 16)
        libc.mallopt(_M_TRIM_THRESHOLD, 1 << 16)
        libc.malloc_trim(0)
        reset.write_text("5")
        before = _kib(status, "VmRSS")
        result = call()
        peak = _kib(status, "VmHWM")
        del result
    except OSError:
        return None
    return max(0, peak - before) * 1024


def _kib(status: Path, field: str) -> int:
    line = next(line for line in status.read_text().splitlines() if line.startswith(field))
    return int(line.split()[1])
