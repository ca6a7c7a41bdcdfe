"""The composition table: every public operation and module under what a PyTorch user does around a call.

A cell is right against float64 or plain eager, or it is refused with its text (:mod:`tests.compositions.table`).
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import fastxattn
import fastxattn.nn
from tests.compositions import table
from tests.compositions.columns import COLUMNS
from tests.compositions.fresh import FRESH
from tests.compositions.problem import Problem
from tests.compositions.rows import BY_NAME, NOT_COMPUTING, ROWS

ROOT = Path(__file__).resolve().parents[1]
IN_OTHER_PROCESSES = (*FRESH, "inductor", "fork")


def judge(row: str, column: str, said: str) -> str:
    """What is wrong with a cell that ended with ``said``, empty where nothing was raised."""
    wanted = table.expected(BY_NAME[row], column)
    if said.startswith("Wrong: ") or (said and not wanted):
        return f"{row} | {column}: {said}"
    if wanted and not said:
        return f"{row} | {column} is right; the table says that it is refused with {wanted!r}"
    return "" if re.search(wanted, said) else f"{row} | {column}: refused, but not with {wanted!r}: {said}"


def outcome(cell: Callable[[Problem], None], row: str) -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            cell(Problem(BY_NAME[row]))
        except Exception as error:
            return f"{type(error).__name__}: {error}"
    return ""


@pytest.mark.parametrize("column", COLUMNS)
@pytest.mark.parametrize("row", BY_NAME)
def test_cell(row: str, column: str) -> None:
    if table.applies(BY_NAME[row], column):
        assert not (fault := judge(row, column, outcome(COLUMNS[column], row))), fault


def test_cells_of_fresh_processes(tmp_path: Path) -> None:
    """Compiled calls as the first use of a process, and calls after a fork."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-m", "tests.compositions.fresh"], cwd=ROOT, env=env, capture_output=True, text=True,
        timeout=3600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    cells = [json.loads(line) for line in done.stdout.splitlines()]
    wanted = {(row.name, c) for row in ROWS for c in IN_OTHER_PROCESSES if table.applies(row, c)}
    assert {(cell["row"], cell["column"]) for cell in cells} == wanted
    assert [fault for cell in cells if (fault := judge(cell["row"], cell["column"], cell["outcome"]))] == []


def test_every_public_name_is_in_the_table() -> None:
    covered = {name for row in ROWS for name in row.covers}
    assert set(fastxattn.__all__) - covered - NOT_COMPUTING == set()
    assert set(fastxattn.nn.__all__) - covered == set()
    assert covered <= set(fastxattn.__all__) | set(fastxattn.nn.__all__)
    assert set(table.HEADINGS) == {*COLUMNS, *IN_OTHER_PROCESSES}


def test_what_is_refused_works_on_the_reference_backend() -> None:
    """The way out that the messages and the page name, against float64: :func:`near` is in each column."""
    for row in ROWS:
        for column in ("second derivative", "forward mode", "jacrev(jacrev)"):
            if table.applies(row, column) and table.expected(row, column):
                with fastxattn.runtime.backend.use_backend("reference"):
                    assert outcome(COLUMNS[column], row.name) == "", (row.name, column)


@pytest.mark.parametrize(
    ("what", "broken", "row", "column"),
    [
        ("fastxattn.runtime.operators.refuse", lambda message, results, sources: results, "maxsim", "second derivative"),
        ("fastxattn.runtime.operators.KernelFunction.jvp", lambda ctx, *t: (torch.zeros(9, 2, 8), torch.zeros(2, 9).double()), "varlen_cross_attention",
         "forward mode"),
        ("fastxattn.ops.retrieval.api.derivative_wanted", lambda *t: False, "topk_similarity", "eager"),
        ("fastxattn.ops.attention.autograd.NEEDS", {"key": 1, "query": 2, "value": 4, "key_bias": 8, "bias": 16},
         "MultiheadCrossAttention, value", "eager"),
    ],
)  # fmt: skip
def test_a_broken_library_fails(
    what: str, broken: object, row: str, column: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert judge(row, column, outcome(COLUMNS[column], row)) == ""
    monkeypatch.setattr(what, broken)
    assert "Wrong: " in judge(row, column, outcome(COLUMNS[column], row))


def test_judge() -> None:
    assert judge("ModalityGate", "vmap", "RuntimeError: no").startswith("ModalityGate | vmap: RuntimeError")
    assert "is right; the table says" in judge("maxsim", "forward mode", "")
    assert "refused, but not with" in judge("maxsim", "forward mode", "TypeError: bad")
    assert judge("maxsim", "forward mode", f"RuntimeError: {table.FORWARD}") == ""
