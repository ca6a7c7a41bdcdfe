"""Whether Triton kernels can run: on CUDA and ROCm devices, and on CPU tensors under Triton's interpreter."""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import os

import torch

from fastxattn.runtime.cuda import too_old

OLDEST_VERSION = (3, 5)
"""Of Triton: older ones lack what the kernels are written with (``constexpr_function``)."""


@functools.cache
def interpreted() -> bool:
    """Whether Triton interprets kernels in this process."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


@functools.cache
def missing() -> str | None:
    """What is wrong with the installation; None when nothing is."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed; install it with `pip install fastxattn[triton]`"
    try:
        version = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:  # builds for other devices have other names
        return None
    if tuple(int(part) for part in version.split(".")[:2]) < OLDEST_VERSION:
        return f"triton {version} is installed, and the kernels need 3.5 or newer"
    return None


def unavailable(device: torch.device) -> str | None:
    """Why no Triton kernel runs on ``device``; None when they do."""
    if device.type == "cpu" and not interpreted():
        return "the tensors are on cpu, and TRITON_INTERPRET=1 is not set"
    if device.type not in ("cpu", "cuda"):
        return f"the tensors are on {device.type}"
    if torch.compiler.is_compiling():  # neither an installation nor a device is something to trace
        return None
    return missing() or too_old(device)
