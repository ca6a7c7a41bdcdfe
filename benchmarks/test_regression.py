"""The CPU regression set: ``make bench-regression``; ``pytest-benchmark compare`` shows what changed between runs.

No assertion is about time; the check that gates each case's speed is asserted.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from benchmarks.bench_attention import SHAPES, workload
from benchmarks.bench_context import layer_workload
from benchmarks.bench_contrastive import loss_case, maxsim_case, topk_case
from fastxattn.bench import Workload

CASES: dict[str, Callable[[], Workload]] = {}
for shape in SHAPES:
    for dtype in (torch.float32, torch.bfloat16):
        for grad in (False, True) if "ragged" in shape.name else (False,):
            title = f"{shape.name}, {str(dtype).removeprefix('torch.')}, {'forward+backward' if grad else 'forward'}"
            CASES[title] = lambda shape=shape, dtype=dtype, grad=grad: workload(shape, dtype, grad)
CASES |= {
    "infonce N=256": loss_case("infonce", 256, 512, torch.float32).build,
    "sigmoid N=256": loss_case("sigmoid", 256, 512, torch.float32).build,
    "late interaction, 16 sets": maxsim_case(16, 32, 196, 128).build,
    "top-10 of 20000": topk_case(20_000, 128, 16, 10).build,
    "context attention, 1 query": lambda: layer_workload(torch.float32, 1, 1024, 16, 64),
}


@pytest.mark.parametrize("name", CASES)
def test_case(benchmark, name: str) -> None:  # type: ignore[no-untyped-def]
    work = CASES[name]()
    assert work.check() == "ok"
    ours = next(call for provider, call in work.providers.items() if provider.startswith("fastxattn"))
    benchmark.pedantic(ours, rounds=7, iterations=3, warmup_rounds=1)
