"""The CPU operators as a boundary: a call of any arguments gives a result or an error with a message, never a crash."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks.soak import hostile
from fastxattn.runtime import native

pytestmark = pytest.mark.skipif(native.cpu_library().library is None, reason="needs the CPU kernels")
CALLS = 200
OPS = torch.ops.fastxattn


def ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def at_odd_byte(*shape: int) -> Tensor:
    return hostile.at_odd_byte(torch.ones(*shape))


REFUSED: dict[str, tuple[Callable[[], object], str]] = {
    "merge into 2^33 rows": (
        lambda: OPS.pruning_merge_cpu(torch.ones(2, 3), ints(0, 1), None, 1 << 33),
        "rows must be in 0..2^31 - 1; got 8589934592",
    ),
    "select with a capacity of 2^62": (
        lambda: OPS.pruning_select_cpu(torch.ones(2), ints(0, 2), ints(1), None, None, 1 << 62),
        "capacity must be in 0..2^31 - 1; got 4611686018427387904",
    ),
    "the best 2^40 rows": (
        lambda: OPS.topk_similarity_cpu(torch.ones(1, 2), torch.ones(3, 2), None, 1 << 40, 0),
        "k must be in 1..2^31 - 1; got 1099511627776",
    ),
    "rows numbered past int64": (
        lambda: OPS.topk_similarity_cpu(torch.ones(1, 2), torch.ones(3, 2), None, 1, (1 << 63) - 2),
        "first must be",
    ),
    "rows beyond memory": (
        lambda: OPS.absorbed_attention_cpu(
            torch.ones(1, 1, 1).expand(1 << 61, 1, 1), torch.ones(2, 1), ints(0, 1), ints(0, 2), None, None, 1.0
        ),
        "out of memory for a result of 2305843009213693952 elements",
    ),
    "a shape whose product overflows": (
        lambda: OPS.co_attention_cpu(
            torch.ones(1, 1, 1).expand(1 << 56, 4, 1),
            torch.ones(1, 4, 1),
            torch.ones(1, 1, 1).expand(1 << 56, 4, 1),
            torch.ones(1, 4, 256),
            ints(0, 1),
            ints(0, 1),
            None,
            None,
            1.0,
            0.0,
            0.0,
            None,
        ),
        "out of memory for a result of",
    ),
    "memory at an odd address": (
        lambda: OPS.pruning_gather_cpu(torch.ones(2, 3), ints(0, 1), at_odd_byte(2)),
        "argument 2 of the operator lies at an address that is no multiple of its element size, 4; clone it",
    ),
    "counts without an axis": (
        lambda: OPS.pruning_quantile_cpu(torch.tensor(1.0), ints(0, 1), torch.ones(1)),
        "scores must have 1 dimension; got 0",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_arguments_that_nothing_is_allocated_for(what: str) -> None:
    call, message = REFUSED[what]
    with pytest.raises(RuntimeError, match=re.escape(message)):
        call()


@pytest.mark.parametrize("k", [8193, 9000, 20000])
def test_more_best_rows_than_a_chunk_or_the_corpus_has(k: int) -> None:
    generator = torch.Generator().manual_seed(0)
    queries, corpus = (torch.randint(-9, 10, (n, 2), generator=generator).float() for n in (3, 9000))
    scores, indices = OPS.topk_similarity_cpu(queries, corpus, None, k, 0)
    wanted = (queries @ corpus.mT).sort(dim=1, descending=True, stable=True)
    torch.testing.assert_close(scores[:, : len(corpus)], wanted.values[:, :k])
    torch.testing.assert_close(indices[:, : len(corpus)], wanted.indices[:, :k])
    assert (scores[:, len(corpus) :] == -torch.inf).all()
    assert (indices[:, len(corpus) :] == -1).all()


def test_rows_at_odd_elements_give_the_same_results() -> None:
    """Vectors and pairs of 16-bit values are read wherever they start, on every instruction set."""
    calls = [call for seed in range(30) for call in hostile.recorded(seed)]
    try:
        for isa in native.available_cpu_isas():
            native.force_cpu_isa(isa)
            for operator, args in calls:
                wide = (isinstance(a, Tensor) and a.element_size() == 2 and a.numel() > 0 for a in args)
                moved = [hostile.at_odd_element(a) if odd else a for a, odd in zip(args, wide, strict=True)]
                try:
                    found = operator(*moved)
                except RuntimeError as error:  # operators that want contiguous rows
                    if "contiguous" in str(error):
                        continue
                    raise
                torch.testing.assert_close(found, operator(*args), equal_nan=True)
    finally:
        native.force_cpu_isa("auto")


def test_hostile_arguments_give_a_result_or_an_error() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.soak.hostile", "0", "0", str(CALLS)],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=False,
        timeout=1800,
    )
    last = done.stdout.splitlines()[-1:]
    assert done.returncode == 0, f"{last}\n{done.stderr[-4000:]}"
    calls, outcomes = Counter[str](), Counter[str]()
    for text in done.stdout.splitlines():
        for what, count in json.loads(text).get("counts", {}).items():
            operator, outcome = what.split(": ")
            calls[operator] += count
            outcomes[what] += count
            assert outcome in ("ran", "refused")
    assert set(calls) == set(hostile.operators())
    assert min(calls.values()) >= CALLS
    assert set(outcomes) == {f"{operator}: {outcome}" for operator in calls for outcome in ("ran", "refused")}


@pytest.mark.parametrize("message", ["", "std::bad_alloc", "f(x) API call failed at ops.h, line 3"])
def test_an_error_that_says_nothing_is_a_failure(message: str) -> None:
    def silent() -> None:
        raise RuntimeError(message)

    with pytest.raises(AssertionError):
        hostile.attempt(silent, ())
