"""The harness: a failing check hides the speed, rows survive a round trip, ratios are paired."""

from __future__ import annotations

import importlib
import inspect
import math
import time
from pathlib import Path

import pytest
import torch

import fastxattn
from benchmarks.harness import Case, Workload, read_csv, write_csv
from benchmarks.harness.registry import run_case, run_cases
from benchmarks.harness.report import markdown_table, plot_ratios, roofline_table
from benchmarks.test_regression import HEAVY
from fastxattn.runtime.timing import OutOfTime, Timing, interleaved, peak_extra_bytes
from fastxattn.testing import assert_within_budget, measure_error

TIMED = {
    "co_attention": "co_attention ",
    "absorbed_attention": "absorbed_attention layer",
    "cross_attention": "attention padded ",
    "distillation_loss": "infonce ",  # the same operator, and a product per direction
    "infonce_loss": "infonce ",
    "key_importance": "importance ",
    "late_interaction_loss": "late_interaction ",
    "maxsim": "maxsim ",
    "multi_positive_infonce_loss": "infonce ",
    "prune_tokens": "select_gather ",
    "recall_at_k": "retrieval ",  # a search and a comparison of indices
    "select_tokens": "select ",
    "sigmoid_loss": "sigmoid ",
    "topk_similarity": "retrieval ",
    "varlen_cross_attention": "attention text to image",
}
"""How the titles of the cases that time a public operation begin."""


def test_every_public_operation_is_timed() -> None:
    public = {name: getattr(fastxattn, name) for name in fastxattn.__all__}
    operations = {n for n, f in public.items() if inspect.isfunction(f) and f.__module__.startswith("fastxattn.ops.")}
    operations.remove("register_strategy")  # computes nothing
    assert operations == set(TIMED)
    files = sorted((Path(__file__).parents[1] / "benchmarks").glob("bench_*.py"))
    titles = [
        f"{case.op} {case.title}"
        for path in files
        if path.stem not in HEAVY
        for case in importlib.import_module(f"benchmarks.{path.stem}").cases(False)
    ]
    assert [op for op, beginning in TIMED.items() if not any(t.startswith(beginning) for t in titles)] == []


def case(gate: str, name: str = "toy") -> Case:
    workload = Workload({"fastxattn cpu": lambda: None, "eager": lambda: None}, "eager", lambda: gate, flops=1e6)
    return Case("toy", name, "forward", torch.float32, lambda: workload)


def test_no_speed_is_reported_outside_the_error_budget() -> None:
    records = {r.provider: r for r in run_case(case("out: max error 1 (budget 0)"), rounds=3)}
    assert math.isnan(records["fastxattn cpu"].median_ms)
    assert math.isnan(records["fastxattn cpu"].ratio)
    assert records["fastxattn cpu"].gate == "out: max error 1 (budget 0)"
    assert records["eager"].median_ms > 0


def test_csv_round_trip_replaces_only_the_same_cases(tmp_path: Path) -> None:
    path = tmp_path / "toy.csv"
    write_csv(path, run_case(case("ok", "first"), rounds=3) + run_case(case("ok", "second"), rounds=3))
    write_csv(path, run_case(case("ok", "second"), rounds=3))
    rows = read_csv(path)
    assert [r.case for r in rows] == ["first", "first", "second", "second"]
    assert rows[0].threads == torch.get_num_threads()
    assert {r.gate for r in rows} == {"ok", "rival"}
    assert "| first | forward | float32 | eager |" in markdown_table(rows, "fastxattn cpu")
    plot_ratios(rows, "fastxattn cpu", tmp_path / "toy.png", "toy")
    assert (tmp_path / "toy.png").stat().st_size > 1000


def test_ratio_is_the_median_of_paired_rounds() -> None:
    ours, theirs = Timing((1.0, 10.0, 1.0)), Timing((2.0, 20.0, 4.0))
    assert ours.ratio_to(theirs) == 2.0
    assert ours.median == 1.0


def test_peak_memory_sees_a_temporary() -> None:
    small = peak_extra_bytes(lambda: torch.zeros(10))
    large = peak_extra_bytes(lambda: torch.zeros(4_000_000).sum())
    if small is None or large is None:
        pytest.skip("this platform does not report peak memory")
    assert 15e6 < large < 40e6
    assert small < 5e6


def test_budget_catches_errors_bias_and_misplaced_nan() -> None:
    generator = torch.Generator().manual_seed(0)
    reference = torch.randn(1000, generator=generator, dtype=torch.float64)
    eager = reference.float() + 1e-6 * torch.randn(1000, generator=generator)
    assert_within_budget("good", reference.float(), reference, eager)
    with pytest.raises(AssertionError, match="OUTSIDE"):
        assert_within_budget("one wrong element", reference.float() + (torch.arange(1000) == 7), reference, eager)
    with pytest.raises(AssertionError, match="mean error"):
        assert_within_budget("biased", reference.float() + 2e-6, reference, eager)
    misplaced = reference.float().clone()
    misplaced[3] = float("nan")
    assert not measure_error("nan", misplaced, reference, eager).ok
    with pytest.raises(ValueError, match="shapes differ"):
        measure_error("shape", eager[:3], reference, eager)


def test_no_case_begins_when_time_is_up(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("FASTXATTN_BENCH_UNTIL", "1")
    assert run_cases([case("ok")]) == []
    assert "not measured: toy forward float32" in capsys.readouterr().out
    monkeypatch.delenv("FASTXATTN_BENCH_UNTIL")
    assert len(run_cases([case("ok")], rounds=3)) == 2


def test_time_is_shared_out_and_what_is_left_is_always_on_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    left, seen, kept = tmp_path / "left", [], []

    def slow() -> Workload:
        seen.append(left.read_text().splitlines())
        return Workload({"fastxattn cpu": lambda: time.sleep(0.4), "eager": lambda: None}, "eager", lambda: "ok")

    cases = [case("ok", "first"), Case("toy", "slow", "forward", torch.float32, slow), case("ok", "last")]
    monkeypatch.setenv("FASTXATTN_BENCH_LEFT", str(left))
    monkeypatch.setenv("FASTXATTN_BENCH_UNTIL", str(time.time() + 1e9))
    assert len(run_cases(cases, rounds=3, max_seconds=0.1, keep=kept.append)) == 6
    assert left.read_text() == ""
    assert seen == [["slow forward float32", "last forward float32"]]
    assert [rows[0].case for rows in kept] == ["first", "slow", "last"]
    monkeypatch.setenv("FASTXATTN_BENCH_UNTIL", "1")
    assert run_cases(cases) == []
    assert len(left.read_text().splitlines()) == 3


def test_a_case_that_cannot_end_in_time_is_given_up() -> None:
    with pytest.raises(OutOfTime):
        interleaved({"slow": lambda: time.sleep(0.05)}, rounds=50, deadline=time.time() + 0.1)


def test_rows_carry_their_bounds(tmp_path: Path) -> None:
    work = Workload({"fastxattn cpu": lambda: None, "eager": lambda: None}, "eager", lambda: "ok", bytes=1e6)
    (row, _) = run_case(Case("toy", "moves", "forward", torch.float32, lambda: work), rounds=3)
    assert row.bound == "memory"
    assert row.roofline > 0
    assert row.peak_gbytes > 0
    write_csv(tmp_path / "toy.csv", [row])
    (again,) = read_csv(tmp_path / "toy.csv")
    assert again.bound == "memory"
    assert math.isclose(again.roofline, row.roofline, rel_tol=0.01)
    assert "| toy | moves | forward | float32 |" in roofline_table([again])


def test_a_slow_case_ends_after_three_rounds() -> None:
    taken = interleaved({"slow": lambda: time.sleep(0.02)}, rounds=50, max_seconds=0.0)
    assert len(taken["slow"].rounds) == 3
