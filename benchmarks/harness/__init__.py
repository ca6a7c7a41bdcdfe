"""Timing that can be believed: interleaved rivals, checked results, one CSV schema, plots drawn from the CSV."""

from benchmarks.harness.records import Record, read_csv, write_csv
from benchmarks.harness.registry import Case, Workload, run_cases
from fastxattn.runtime.timing import Timing, interleaved

__all__ = ["Case", "Record", "Timing", "Workload", "interleaved", "read_csv", "run_cases", "write_csv"]
