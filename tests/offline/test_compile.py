"""Kernels compile without a GPU, without spills, within shared memory, onto matrix units.

Head dim 64, where most models are,
on every architecture; ``benchmarks/offline.py`` does every shipped configuration and
its table, benchmarks/results/offline.csv, is held to the same gates here.
"""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).resolve().parents[2]
TABLE = ROOT / "benchmarks/results/offline.csv"


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_head_dim_64_compiles_and_passes_the_gates(arch):
    # Its own process: this one may be interpreting Triton.
    environment = os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "benchmarks/offline.py", "--arch", arch, "--dim", "64", "--dtype", "fp16"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    assert done.stdout.count(", ok") >= 10


def test_every_row_of_the_table_passes_the_gates():
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        import offline
    finally:
        sys.path.pop(0)
    numbers = ("dim", "registers", "spills", "shared", "occupancy", "instructions")
    with TABLE.open() as file:
        rows = [
            offline.Row(**{k: int(v) if k in numbers else v for k, v in row.items()}) for row in csv.DictReader(file)
        ]
    assert rows
    bad = [f"{row}: {row.faults()}" for row in rows if row.faults()]
    assert not bad, "\n".join(bad)


def test_the_gates_catch_what_they_are_for():
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        import offline
    finally:
        sys.path.pop(0)
    good = offline.Row("attention", "forward", "fp16", 64, "plain", "t", "sm_90", 128, 0, 65536, 2, 1000, "HGMMA")
    assert not good.faults()
    for change in ({"spills": 8}, {"shared": 300_000}, {"matrix": "FFMA"}):
        assert offline.Row(**{**good.__dict__, **change}).faults()
