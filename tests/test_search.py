"""The search example learns: recall before and after, compositions, and the files it writes."""

from __future__ import annotations

import json

import pytest

from fastxattn.runtime import native

pytest.importorskip("skimage")
pytest.importorskip("matplotlib")
pytestmark = pytest.mark.skipif(native.cpu_library().library is None, reason="needs the CPU kernels")


def test_alignment_is_learned(tmp_path):
    from fastxattn.search import run

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


def test_the_command_prints_a_table_and_writes_the_heat_map(tmp_path):
    testing = pytest.importorskip("typer.testing")
    from fastxattn.cli import app

    def run(*options: str):
        return testing.CliRunner().invoke(app, ["search", "--out", str(tmp_path), "--steps", "1", *options])

    done = run()
    assert done.exit_code == 0, done.output
    for words in ("scenes, before training", "scenes, after training", "told apart", "[image of ", "similarity.png"):
        assert words in done.output.replace("\n", "")  # long paths are wrapped
    done = run("--json")
    facts = json.loads(done.stdout)
    assert facts["recall"] == json.loads((tmp_path / "search.json").read_text())["recall"]
    assert (tmp_path / "similarity.png").read_bytes().startswith(b"\x89PNG")
    assert run("--steps", "0").exit_code == 2
