"""Random problems of the losses with every option, held to float64: results, figures and every gradient."""

from __future__ import annotations

import re
from collections import Counter

import pytest
import torch

from benchmarks.soak.__main__ import LIMIT
from benchmarks.soak.makers import OPTIONS
from benchmarks.soak.trials import DTYPES, Draw, Trial, judge, results
from fastxattn.runtime import native, triton
from fastxattn.testing.budget import largest

PROBLEMS = 240
"""Of each loss; ``make soak`` tries more than 10 000 others."""
UNITS = 32
"""Units of float32 rounding that the reference's results may be off by, of the largest result or logit."""
KERNELS = [
    pytest.param("cpu", PROBLEMS, marks=pytest.mark.skipif(native.cpu_library().library is None, reason="no kernels")),
    pytest.param("triton", 24, marks=pytest.mark.skipif(not triton.interpreted(), reason="needs TRITON_INTERPRET=1")),
]


def trial(op: str, seed: int) -> Trial:
    return OPTIONS[op](Draw(seed, DTYPES[seed % 3]))


@pytest.mark.parametrize(("backend", "number"), KERNELS)
@pytest.mark.parametrize("op", OPTIONS)
def test_kernels(op: str, backend: str, number: int) -> None:
    outside = 0
    for seed in range(number):
        problem = trial(op, seed)
        found = judge(problem, backend)
        assert not found.fault, (seed, problem.case, found)
        assert found.error <= LIMIT * found.budget, (seed, problem.case, found)
        outside += found.error > found.budget
    assert outside <= number / 100  # by luck, see docs/design/reliability.md


@pytest.mark.parametrize("op", OPTIONS)
def test_the_reference_computes_in_float32(op: str) -> None:
    for seed in range(PROBLEMS):
        problem = trial(op, seed)
        truth, found = (results(problem, "reference", dtype) for dtype in (torch.float64, None))
        for name, value in found.items():
            assert value.shape == truth[name].shape
            assert torch.equal(value.isnan(), truth[name].isnan()), (seed, name, problem.case)
            if name.startswith("out"):
                assert value.dtype == torch.float32, (seed, name, problem.case)
                unit = torch.finfo(torch.float32).eps * max(1.0, largest(truth[name]), problem.terms)
                assert largest(value.double() - truth[name]) <= UNITS * unit, (seed, name, problem.case)


def test_every_option_is_tried_and_several_together() -> None:
    seen: Counter[str] = Counter()
    for op in OPTIONS:
        for seed in range(PROBLEMS):
            words = set(re.findall(r"\w+", trial(op, seed).case))
            seen.update(words)
            seen["three masks"] += {"targets", "ignore_ids", "exclude_self"} <= words
            seen["all negatives"] += {"image_queue", "text_queue", "hard_negatives"} <= words
    wanted = (
        "targets",
        "groups",
        "ignore_ids",
        "exclude_self",
        "normalize",
        "weights",
        "reduction",
        "hard_negatives",
        "image_queue",
        "text_queue",
        "teacher",
        "label_smoothing",
        "decoupled",
        "symmetric",
        "false_negative_margin",
        "return_metrics",
        "autocast",
        "three masks",
        "all negatives",
    )
    assert [name for name in wanted if seen[name] < 3] == []
