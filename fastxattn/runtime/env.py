"""The environment variables fastxattn reads; all but FASTXATTN_TUNING once, at import.

========================  =====================================================================
FASTXATTN_BACKEND         what ``backend="auto"`` means: auto (default), reference, cpu, triton, cuda, flash
FASTXATTN_CPU_ISA         forces the CPU kernels' instruction set, one of those that ``fastxattn env`` lists
FASTXATTN_TUNING          the file of measured tile sizes, ``~/.cache/fastxattn/tuning.json`` by default
FASTXATTN_VALIDATE        1: check the contents of offsets and indices on GPUs too (synchronises)
========================  =====================================================================
"""

from __future__ import annotations

import os

BACKENDS = ("auto", "reference", "cpu", "triton", "cuda", "flash")


def _choice(name: str, default: str, allowed: tuple[str, ...]) -> str:
    value = os.environ.get(name, "") or default
    if value not in allowed:
        raise ValueError(f"environment variable {name} must be one of {', '.join(allowed)}; got {value!r}")
    return value


default_backend: str = _choice("FASTXATTN_BACKEND", "auto", BACKENDS)
validate_on_gpu: bool = _choice("FASTXATTN_VALIDATE", "0", ("0", "1")) == "1"
forced_cpu_isa: str = os.environ.get("FASTXATTN_CPU_ISA", "")
