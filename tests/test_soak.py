"""The soak finds what it looks for: a wrong kernel, a crash, and files that are broken in every way."""

from __future__ import annotations

import json
import random
import sys
from dataclasses import replace

import pytest
import torch

from benchmarks.soak.__main__ import LIMIT, MARKS, problems, table
from benchmarks.soak.makers import MAKERS, OPTIONS
from benchmarks.soak.parts import Outcome, broken
from benchmarks.soak.problems import one
from benchmarks.soak.trials import DTYPES, Draw, judge, results
from fastxattn.cli.problems import BUILDERS
from fastxattn.runtime import native
from fastxattn.testing.budget import of_few

needs_native = pytest.mark.skipif(native.cpu_library().library is None, reason="needs the CPU kernels")


@pytest.fixture(autouse=True)
def settings():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    if native.cpu_library().library is not None:
        native.force_cpu_isa("auto")


@needs_native
@pytest.mark.parametrize("op", [*MAKERS, *OPTIONS])
def test_every_operation_passes_and_a_wrong_one_does_not(op: str) -> None:
    for seed in range(3):
        trial = {**MAKERS, **OPTIONS}[op](Draw(seed, DTYPES[seed % 3]))
        found = judge(trial, "cpu")
        assert not found.fault, (trial.case, found)
        assert found.error <= LIMIT * found.budget, (trial.case, found)
        if any(t.isfinite().any() for name, t in results(trial, "reference", None).items() if name.startswith("out")):
            right = trial.function

            def wrong(inputs, backend, right=right):  # type: ignore[no-untyped-def]
                out = right(inputs, backend)
                out = out if isinstance(out, tuple) else (out,)
                return out if backend == "reference" else tuple(t + 1 for t in out)

            bad = judge(replace(trial, function=wrong), "cpu")
            assert bad.fault or bad.error > LIMIT * bad.budget


def test_few_large_numbers_are_held_to_rounding_and_many_to_the_budget() -> None:
    many, few = torch.linspace(1, 2, 32), torch.cat([torch.full((31,), 16.0), torch.ones(300)])
    none = torch.zeros(100)
    eps = torch.finfo(torch.float32).eps
    truth = {"many": many.double(), "few": few.double(), "none": none.double()}
    allowed = {name: of_few(name, truth, torch.float32) for name in truth}
    assert allowed == {"many": 0.0, "few": 8 * eps * 16, "none": 8 * eps * 16}


def test_no_operation_is_forgotten() -> None:
    assert {"attention", *MAKERS} >= set(BUILDERS)


@needs_native
def test_a_seed_is_the_same_problem_again(capsys: pytest.CaptureFixture[str]) -> None:
    first, second = one(3, "cpu"), one(3, "cpu")
    assert first == second
    assert json.loads(capsys.readouterr().out.splitlines()[0])["seed"] == 3


@needs_native
def test_problems_are_counted_by_operation_dtype_and_instruction_set() -> None:
    outcome = problems(0.01, 5, "cpu", {})
    assert outcome.failures == []
    assert outcome.counts.total() >= 1
    assert set(outcome.worst) <= set(outcome.counts)
    assert outcome.spread.total() == 3 * outcome.counts.total()
    outcome = problems(0.01, 5, "options", {})
    assert outcome.failures == []
    assert set(outcome.counts) <= set(OPTIONS)


@needs_native
def test_a_process_that_does_not_start_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    assert len(problems(0.01, 5, "cpu", {}).failures) == 1


def test_broken_files_are_broken() -> None:
    data = bytes(range(256)) * 8
    kinds = {broken(data, random.Random(seed))[0] for seed in range(50)}
    assert kinds == {"flip", "cut", "overwrite", "repeat", "empty"}
    assert all(broken(data, random.Random(seed))[1] != data for seed in range(50))


def test_the_record_counts_and_names_what_was_not_run() -> None:
    outcome = Outcome(worst={"attention": 0.5}, small=2)
    outcome.counts["attention"] = 7
    outcome.failures.append("seed 3")
    outcomes = {"cpu": outcome, "sanitized": Outcome(skipped="no compiler"), "ranks": Outcome(skipped="no gloo")}
    text = table(outcomes, 5, 1)
    assert "7 trials in 5 minutes from seed 1, **1 failures**" in text
    assert "| attention | 7 (0.50) |  |" in text
    assert "CPU kernels under ASan and UBSan: not run, no compiler" in text
    assert "2 outside their budget by less than 4 times" in text
    assert "ranks: not run, no gloo" in text
    page = MARKS.sub(lambda m: m[1] + text + m[2], "a\n<!-- soak -->\nold\n<!-- end soak -->\nb")
    assert "old" not in page
    assert page.endswith("<!-- end soak -->\nb")
