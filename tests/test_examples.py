"""The examples run, with small settings, as a user would run them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytest.importorskip("matplotlib")
ROOT = Path(__file__).parents[1]
EXAMPLES = {
    "swap_qformer.py": (
        ["--layers", "2", "--batch", "3", "--longest", "200", "--rounds", "1"],
        "swapped",
        "swap_qformer.png",
    ),
    "train_clip.py": (
        ["--batch", "64", "--steps", "3", "--chunk", "16", "--sizes", "64", "128"],
        "loss",
        "train_clip.png",
    ),
    "prune_vlm.py": (["--layers", "2", "--rounds", "1"], "144 of 576 tokens", "prune_vlm.png"),
    "deploy_onnx.py": ([], "library and portable body differ by", None),
    "train_parity.py": (["--steps", "2"], "largest difference of the losses", "train_parity.png"),
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_example_runs(name: str, tmp_path: Path) -> None:
    arguments, said, picture = EXAMPLES[name]
    arguments = [*arguments, "--out", str(tmp_path / picture)] if picture else [str(tmp_path)]
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / name), *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=900,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])},
    )
    assert done.returncode == 0, done.stderr
    assert said in done.stdout
    if picture:
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")


def test_every_example_is_run_here_or_in_a_test_of_its_own() -> None:
    elsewhere = {"__init__.py", "img_focus.py", "prune_photo.py", "search.py"}  # test_visualize.py, test_search.py
    assert {p.name for p in (ROOT / "examples").glob("*.py")} == {*EXAMPLES, *elsewhere}
