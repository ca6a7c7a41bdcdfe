"""The CPU regression set: ``make bench-regression``; ``pytest-benchmark compare`` shows what changed between runs.

No assertion is about time; the check that gates each case's speed is asserted.
"""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

from benchmarks.harness import Case

# Quick ones of every operation, from the registries that `make bench` runs.
WANTED = (
    r"attention .*ragged.*|attention dense 8x.*",
    r"(infonce|sigmoid) N=256 .*float32",
    r"late_interaction 64 x 64.*",
    r"retrieval top-10 of 200000.*64 queries.*",
    r"absorbed_attention layer, 1 query.*float32",
    r"maxsim .*",
    r"importance 32 queries.*float32",
    r"co_attention LXMERT.* forward float32",
    r"select .*",
)
HEAVY = ("bench_models", "bench_export")
"""Files of whole models and exports: they import much, and are not quick."""


def registry() -> dict[str, Case]:
    """Every case of the set, by name."""
    found: dict[str, Case] = {}
    for path in sorted(Path(__file__).parent.glob("bench_*.py")):
        if path.stem in HEAVY:
            continue
        for case in importlib.import_module(f"benchmarks.{path.stem}").cases(False):
            if any(re.fullmatch(pattern, f"{case.op} {case.title}") for pattern in WANTED):
                found[f"{case.op} {case.title}"] = case
    return found


CASES = registry()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Every case where times are taken; where none are (the gate), each operation's first: that it still runs."""
    if "name" in metafunc.fixturenames:
        config, first = metafunc.config, {case.op: name for name, case in reversed(CASES.items())}
        untimed = config.getoption("benchmark_disable") or hasattr(config, "workerinput")
        metafunc.parametrize("name", first.values() if untimed else CASES)


def test_every_operation_is_in_the_set() -> None:
    ops = {case.op for case in CASES.values()}
    assert ops >= {
        "attention",
        "co_attention",
        "absorbed_attention",
        "importance",
        "infonce",
        "late_interaction",
        "maxsim",
        "retrieval",
        "select",
        "sigmoid",
    }


def test_case(benchmark, name: str) -> None:  # type: ignore[no-untyped-def]
    work = CASES[name].build()
    assert work.check() == "ok"
    ours = next(call for provider, call in work.providers.items() if provider.startswith("fastxattn"))
    benchmark.pedantic(ours, rounds=7, iterations=3, warmup_rounds=1)
