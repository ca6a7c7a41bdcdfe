"""Memory that runs out inside an operator, on the caller's thread or a pool's, is an error for the caller."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fastxattn.runtime import native

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="LD_PRELOAD needs Linux"),
    pytest.mark.skipif(native.cpu_library().library is None, reason="needs the CPU kernels"),
]


@pytest.fixture(scope="module")
def allocator(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The preloaded library whose allocations fail on request."""
    compiler = os.environ.get("CXX", "").split() or [shutil.which("g++") or shutil.which("clang++") or ""]
    if not shutil.which(compiler[0]):
        pytest.skip("no C++ compiler")
    library = tmp_path_factory.mktemp("allocator") / "failing_allocator.so"
    source = HERE / "failing_allocator.cpp"
    subprocess.run(
        [*compiler, "-shared", "-fPIC", "-O1", "-std=c++20", str(source), "-o", str(library), "-ldl"], check=True
    )
    return library


def lines(allocator: Path, part: str) -> list[dict[str, object]]:
    """What the child printed; it ends by itself, and soon."""
    done = subprocess.run(
        [sys.executable, str(HERE / "out_of_memory_run.py"), str(allocator), part],
        cwd=ROOT,
        check=False,
        env={**os.environ, "LD_PRELOAD": str(allocator), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "4"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    *found, end = done.stdout.splitlines()
    assert end == "end"
    return [json.loads(line) for line in found if line.startswith("{")]


def test_every_allocation_of_every_operator(allocator: Path) -> None:
    found = lines(allocator, "operators")
    assert len({line["call"] for line in found}) == 20
    silent = [line for line in found if "memory" not in str(line["error"])]
    assert silent == []


@pytest.mark.parametrize("pool", ["threads", "onnxruntime"])
def test_memory_that_runs_out_on_a_pool_thread(allocator: Path, pool: str) -> None:
    if pool == "onnxruntime" and importlib.util.find_spec("onnxruntime") is None:
        pytest.skip("onnxruntime is not installed")
    (line,) = lines(allocator, pool)
    assert "out of memory" in str(line["error"])
