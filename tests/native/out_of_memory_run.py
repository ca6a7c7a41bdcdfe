"""Runs with failing_allocator preloaded: ``python out_of_memory_run.py LIBRARY operators|threads|onnxruntime``.

Prints one line of JSON for each call whose memory ran out: what it was and what the caller was told.
"""

from __future__ import annotations

import ctypes
import json
import sys
import tempfile
from collections.abc import Callable
from typing import Any

import torch

import fastxattn
from benchmarks.soak.hostile import operators, recorded
from fastxattn.runtime import native
from fastxattn.runtime.operators import run as below_autograd

ALLOCATOR = ctypes.CDLL(sys.argv[1])
ALLOCATOR.fail_allocation.argtypes = [ctypes.c_long, ctypes.c_size_t, ctypes.c_int]
LEAST = 1024
MOST = 40
LENGTHS_Q, LENGTHS_K = (1500, 1500), (3000, 3000)


def run(what: str, after: int, only_workers: bool, call: Callable[[], Any]) -> bool:
    """Whether memory ran out in the call; the error goes into a line."""
    said = ""
    ALLOCATOR.fail_allocation(after, LEAST, only_workers)
    try:
        call()
    except Exception as error:  # whatever it is, the line says so
        said = f"{type(error).__name__}: {error}"
    if not ALLOCATOR.stop_failing():
        return False
    print(json.dumps({"call": what, "after": after, "error": said}), flush=True)
    return True


def every_operator() -> None:
    """Each operator, its first allocation failing, then its second, and so on until none does."""
    torch.set_num_threads(3)
    native.cpu_library()
    missing, seed = set(operators()), 0
    while missing:
        for operator, args in recorded(seed):
            if operator._opname not in missing:
                continue
            for after in range(MOST):
                if not run(
                    operator._opname, after, False, lambda operator=operator, args=args: below_autograd(operator, *args)
                ):
                    break
            if after > 0:  # smaller problems allocate nothing of the size
                missing.discard(operator._opname)
        seed += 1


def large() -> tuple[torch.Tensor, ...]:
    """Attention that every thread of a pool takes part in."""
    total = [sum(LENGTHS_Q), sum(LENGTHS_K)]
    query, key = (torch.randn(n, 8, 64) for n in total)
    return query, key, *(torch.tensor([0, *of], dtype=torch.int32).cumsum(0).int() for of in (LENGTHS_Q, LENGTHS_K))


def in_threads() -> None:
    """Memory runs out on torch's pool threads alone; the next call is right."""
    torch.set_num_threads(4)
    query, key, cu_q, cu_k = large()

    def call() -> torch.Tensor:
        return fastxattn.varlen_cross_attention(query, key, key, cu_q, cu_k, backend="cpu")

    run("attention on torch's pool", 0, True, call)
    torch.testing.assert_close(
        call()[:5, 0],
        fastxattn.varlen_cross_attention(
            query[:5, :1],
            key[:3000, :1],
            key[:3000, :1],
            torch.tensor([0, 5], dtype=torch.int32),
            cu_k[:2],
            backend="reference",
        )[:, 0],
    )


def in_onnxruntime() -> None:
    """The same on ONNX Runtime's."""
    from fastxattn import export

    class Model(torch.nn.Module):
        def forward(self, q: torch.Tensor, k: torch.Tensor, cu_q: torch.Tensor, cu_k: torch.Tensor) -> torch.Tensor:
            return fastxattn.varlen_cross_attention(q, k, k, cu_q, cu_k)

    inputs = large()
    with tempfile.TemporaryDirectory() as folder:
        export.to_onnx(Model().eval(), inputs, f"{folder}/model.onnx")
        session = export.Session(f"{folder}/model.onnx", threads=4)
        run("attention on ONNX Runtime's pool", 0, True, lambda: session(*inputs))
        session(*inputs)


{"operators": every_operator, "threads": in_threads, "onnxruntime": in_onnxruntime}[sys.argv[2]]()
print("end")
