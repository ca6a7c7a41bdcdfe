"""The C++ kernels as a backend."""

from __future__ import annotations

import torch
from torch import Tensor

from fastxattn.runtime import native


def supports(x: Tensor) -> str | None:
    """None when the CPU kernels take tokens like ``x``, else why not."""
    if x.device.type != "cpu":
        return f"needs tensors on the cpu; got {x.device.type}"
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"takes float32, bfloat16 and float16; got {x.dtype}"
    reason: str | None = _missing()
    return reason


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _missing() -> str | None:
    return native.cpu_library().reason
