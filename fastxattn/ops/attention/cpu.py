"""The C++ kernel for CPUs: what it supports. The operator itself is ``torch.ops.fastxattn.attention_cpu``."""

from __future__ import annotations

import torch

from fastxattn.ops.attention import schema  # noqa: F401  (defines the operator)
from fastxattn.ops.attention.problem import Problem
from fastxattn.runtime import native

ready = False
"""Whether the library has been loaded, so that a plain call may go straight to the operator."""

direct = torch.ops.fastxattn.attention_cpu.default._op
"""The operator without Python's dispatch layer, for plain tensors outside of tracing: a fifth of a tiny call's time."""


def supports(problem: Problem) -> str | None:
    """None when the kernel runs this problem, else the reason why not."""
    global ready
    query = problem.query
    if query.device.type not in ("cpu", "meta"):  # on meta the operator's fake gives the shapes
        return f"the tensors are on {query.device.type}"
    if query.dtype == torch.float64:
        return "it computes in float32, and the tensors are float64"
    if query.shape[2] > 256 or problem.value.shape[2] > 256:
        return f"it needs head_dim and value_dim up to 256, got {query.shape[2]} and {problem.value.shape[2]}"
    if torch.compiler.is_compiling():
        return None  # a tracer cannot load a library; the operator's fake does
    reason = native.cpu_library().reason
    ready = reason is None
    return reason
