"""Input factories and error budgets: used by this project's tests, and by anyone who adds a backend."""

from fastxattn.testing.budget import ErrorReport, assert_within_budget, measure_error
from fastxattn.testing.inputs import offsets

__all__ = ["ErrorReport", "assert_within_budget", "measure_error", "offsets"]
