"""The CPU regression set: ``pytest benchmarks/test_regression.py --benchmark-autosave``; ``pytest-benchmark compare``.

No assertion is about time; the check that gates each case's speed is asserted.
"""

from __future__ import annotations

import pytest
import torch

from benchmarks.bench_attention import SHAPES, workload

CASES = [
    (shape, dtype, grad) for shape in SHAPES for dtype in (torch.float32, torch.bfloat16) for grad in (False, True)
]


@pytest.mark.parametrize(
    ("shape", "dtype", "grad"),
    CASES,
    ids=[f"{s.name}, {str(d).removeprefix('torch.')}, {'forward+backward' if g else 'forward'}" for s, d, g in CASES],
)
def test_attention(benchmark, shape, dtype, grad) -> None:  # type: ignore[no-untyped-def]
    work = workload(shape, dtype, grad)
    assert work.check() == "ok"
    benchmark.pedantic(work.providers["fastxattn cpu"], rounds=7, iterations=3, warmup_rounds=1)
