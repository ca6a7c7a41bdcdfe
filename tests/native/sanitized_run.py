"""Runs the cases under AddressSanitizer and UBSan: ``python sanitized_run.py <module dir> <cases>``."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

sys.path[:0] = [sys.argv[1], str(Path(__file__).parent)]
native = importlib.import_module("_fastxattn_native")
cases = importlib.import_module("cases")

for seed in range(int(sys.argv[2])):
    for isa in native.isas():
        cases.run_case(native, seed, isa, workers=2)
print("clean")
