"""Whether a cell of the composition table ended as the table says."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable

from tests.compositions import table
from tests.compositions.problem import Problem
from tests.compositions.rows import BY_NAME


def judge(row: str, column: str, said: str) -> str:
    """What is wrong with a cell that ended with ``said``, empty where nothing was raised."""
    error = table.expected(BY_NAME[row], column)
    if said.startswith("Wrong: ") or (said and not error):
        return f"{row} | {column}: {said}"
    if error and not said:
        return f"{row} | {column} is right; the table expects the error {error!r}"
    return "" if re.search(error, said) else f"{row} | {column}: refused, but not with {error!r}: {said}"


def outcome(cell: Callable[[Problem], None], row: str) -> str:
    """Empty where the cell is right, else what was raised."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            cell(Problem(BY_NAME[row]))
        except Exception as raised:
            return f"{type(raised).__name__}: {raised}"
    return ""
