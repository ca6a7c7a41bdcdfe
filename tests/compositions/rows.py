"""The rows of the composition table: one small problem of every public operation and of every module."""

from __future__ import annotations

from tests.compositions.functions import FUNCTIONS
from tests.compositions.modules import MODULES

ROWS = [*FUNCTIONS, *MODULES]
BY_NAME = {row.name: row for row in ROWS}
NOT_COMPUTING = {
    "__version__",
    "accelerate",
    "accelerated",
    "explain",
    "prune_model",
    "register_adapter",
    "register_strategy",
    "restore",
    "status",
}
"""Public names that compute nothing by themselves: they change models, or describe a call."""
