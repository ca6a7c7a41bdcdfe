"""The composition table: every public operation and module under what a PyTorch user does around a call.

A cell is right against float64 or plain eager, or it is refused with its text (:mod:`tests.compositions.table`).
"""

from __future__ import annotations

import pytest
import torch

import fastxattn
import fastxattn.nn
from tests.compositions import table
from tests.compositions.columns import COLUMNS
from tests.compositions.fresh import IN_OTHER_PROCESSES
from tests.compositions.judge import judge, outcome
from tests.compositions.rows import BY_NAME, NOT_COMPUTING, ROWS


@pytest.mark.parametrize("column", COLUMNS)
@pytest.mark.parametrize("row", BY_NAME)
def test_cell(row: str, column: str) -> None:
    if table.applies(BY_NAME[row], column):
        assert not (fault := judge(row, column, outcome(COLUMNS[column], row))), fault


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


def no_tangent(ctx: object, *tangents: object) -> tuple[torch.Tensor, torch.Tensor]:
    """Zeros for attention's two results."""
    return torch.zeros(9, 2, 8), torch.zeros(2, 9, dtype=torch.float64)


BROKEN = {
    "second derivatives of 0": (
        "fastxattn.runtime.operators.refuse",
        lambda message, results, sources: results,
        "maxsim",
        "second derivative",
    ),
    "tangents of 0": (
        "fastxattn.runtime.operators.KernelFunction.jvp",
        no_tangent,
        "varlen_cross_attention",
        "forward mode",
    ),
    "no gradient": ("fastxattn.ops.retrieval.api.derivative_wanted", lambda *t: False, "topk_similarity", "eager"),
    "another's gradient": (
        "fastxattn.ops.attention.problem.Problem.bits",
        {"key": 1, "query": 2, "value": 4, "key_bias": 8, "bias": 16},
        "MultiheadCrossAttention, value",
        "eager",
    ),
}


@pytest.mark.parametrize(("what", "broken", "row", "column"), BROKEN.values(), ids=BROKEN)
def test_a_broken_library_fails(
    what: str, broken: object, row: str, column: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert judge(row, column, outcome(COLUMNS[column], row)) == ""
    monkeypatch.setattr(what, broken)
    assert "Wrong: " in judge(row, column, outcome(COLUMNS[column], row))


def test_judge() -> None:
    assert judge("ModalityGate", "vmap", "RuntimeError: no").startswith("ModalityGate | vmap: RuntimeError")
    assert "is right; the table expects" in judge("maxsim", "forward mode", "")
    assert "refused, but not with" in judge("maxsim", "forward mode", "TypeError: bad")
    assert judge("maxsim", "forward mode", f"RuntimeError: {table.FORWARD}") == ""
