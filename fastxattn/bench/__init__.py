"""Timing that can be believed: interleaved rivals, checked results, one CSV schema, plots drawn from the CSV."""

from fastxattn.bench.records import Record, read_csv, write_csv
from fastxattn.bench.registry import Case, Workload, run_cases
from fastxattn.bench.timing import Timing, interleaved

__all__ = ["Case", "Record", "Timing", "Workload", "interleaved", "read_csv", "run_cases", "write_csv"]
