"""Whether the CUDA C++ kernels can run, and the call that launches one."""

from __future__ import annotations

from typing import Any

import torch

from fastxattn.runtime import native

_OLDEST = (8, 0)


def unavailable(device: torch.device) -> str | None:
    """Why no CUDA C++ kernel runs on ``device``; None when they do."""
    if device.type != "cuda":
        return f"the tensors are on {device.type}"
    if torch.version.hip is not None:
        return "it is written for NVIDIA devices"
    if torch.compiler.is_compiling():  # neither a device nor a library is something to trace
        return None
    return too_old(device) or native.cuda_library().reason


def capability(device: torch.device) -> tuple[int, int] | None:
    """Compute capability of a device; None where there is none to ask (fake tensors), or where it means another thing.

    ROCm numbers its devices differently.
    """
    if device.type != "cuda" or torch.version.hip is not None or not torch.cuda.is_available():
        return None
    return torch.cuda.get_device_capability(device)


def too_old(device: torch.device) -> str | None:
    """Why a device is too old for the CUDA kernels; None when it is not, or where torch sees no CUDA device."""
    found = capability(device)
    if found is None or found >= _OLDEST:
        return None
    return f"it needs compute capability 8.0, and the device has {found[0]}.{found[1]}"


def launch(name: str, *arguments: Any) -> None:
    """Operator ``<name>_cuda_launch`` of libfastxattn_cuda.so, which writes into what it is given."""
    getattr(torch.ops.fastxattn, f"{name}_cuda_launch")(*arguments)


def aligned(*tensors: torch.Tensor) -> bool:
    """Whether all rows of these matrices start at multiples of 16 bytes, as wide copies need."""
    return all(t.data_ptr() % 16 == 0 and t.stride(0) * t.element_size() % 16 == 0 for t in tensors)
