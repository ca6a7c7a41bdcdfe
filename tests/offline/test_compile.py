"""Kernels compile without a GPU, without spills, within shared memory, onto matrix units.

A kernel or two on every architecture; ``benchmarks/offline.py`` does every shipped configuration and its table,
benchmarks/results/offline.csv, is held to the same gates here.
"""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).resolve().parents[2]
TABLE = ROOT / "benchmarks/results/offline.csv"


@pytest.fixture
def offline(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("offline")


@pytest.mark.parametrize(
    ("arch", "case"),
    [
        ("sm_80", ".backward_key.fp16.plain.64."),
        ("sm_90", ".split.fp16.plain.64."),
        ("sm_100", "importance.fp16.rich.64."),
        ("gfx942", ".backward_query.fp16.plain.64."),
    ],
)
def test_a_kernel_compiles_and_passes_the_gates(arch, case):
    # Its own process: this one may be interpreting Triton.
    environment = os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "benchmarks/offline.py", "--arch", arch, "--match", case]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    assert done.stdout.count(", ok") == 1, done.stdout


# Named in docs/design/triton.md, with what was tried: bytes spilled by (op, kernel, dtype, dim, variant, target).
SPILLS = {
    ("attention", "backward_key", "fp32", 256, "rich", "sm_80"): 32,
    ("attention", "backward_key", "fp32", 256, "rich", "sm_90"): 64,
    ("attention", "backward_key", "fp32", 256, "rich", "sm_100"): 56,
}


def test_every_row_of_the_table_passes_the_gates(offline):
    rows = offline.read(TABLE)
    shipped = {(case, arch) for arch in offline.TARGETS for case in offline.cases(arch)}
    assert {(row.case(), row.arch) for row in rows} == shipped, "rows are missing, or of tiles that are not shipped"
    bad = {(r.op, r.kernel, r.dtype, r.dim, r.variant, r.arch): r for r in rows if r.faults()}
    assert {name: row.spills for name, row in bad.items()} == SPILLS
    assert all(len(row.faults()) == 1 for row in bad.values()), "more than spilled bytes"


def test_tables_of_the_page_are_those_of_the_csv():
    done = subprocess.run([sys.executable, "-m", "benchmarks.roofline", "--check"], cwd=ROOT, check=False)
    assert done.returncode == 0, "run `python -m benchmarks.roofline`"


def test_the_gates_catch_what_they_are_for(offline):
    good = offline.Row("attention", "forward", "fp16", 64, "plain", "t", "sm_90", 128, 0, 65536, 2, 1000, "HGMMA")
    assert not good.faults()
    for change in ({"spills": 8}, {"shared": 300_000}, {"matrix": "FFMA"}):
        assert offline.Row(**{**good.__dict__, **change}).faults()
