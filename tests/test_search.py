"""The search example learns: recall before and after, compositions, and the files it writes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastxattn.runtime import native

ROOT = Path(__file__).parents[1]
pytest.importorskip("skimage")
pytest.importorskip("matplotlib")
pytestmark = pytest.mark.skipif(native.cpu_library().library is None, reason="needs the CPU kernels")


def test_alignment_is_learned(tmp_path):
    from examples.search import run

    report = run(tmp_path, steps=100)
    before, after = report.recall["scenes, before training"], report.recall["scenes, after training"]
    for direction in ("a->b@5", "b->a@5"):
        assert before[direction] <= 0.2
        assert after[direction] >= 0.6
    assert sum(report.compositional.values()) >= 2
    photos = [name for name in report.recall if "photographs" in name]
    assert report.recall[photos[1]]["a->b@5"] > report.recall[photos[0]]["a->b@5"]
    assert (tmp_path / "similarity.png").stat().st_size > 10_000
    assert json.loads((tmp_path / "search.json").read_text())["recall"] == report.recall
    assert "told apart" in str(report)


def test_the_script_prints_its_report_and_writes_the_heat_map(tmp_path):
    def run(*options: str):
        command = [sys.executable, "examples/search.py", "--out", str(tmp_path), "--steps", "1", *options]
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False, timeout=600)

    done = run()
    assert done.returncode == 0, done.stderr
    for words in ("scenes, before training", "scenes, after training", "told apart", "[image of ", "similarity.png"):
        assert words in done.stdout
    done = run("--json")
    facts = json.loads(done.stdout)
    assert facts["recall"] == json.loads((tmp_path / "search.json").read_text())["recall"]
    assert (tmp_path / "similarity.png").read_bytes().startswith(b"\x89PNG")
    assert run("--steps", "0").returncode == 2
