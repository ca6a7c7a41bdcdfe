"""The command line, run as a user runs it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import fastxattn


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "fastxattn", *arguments], capture_output=True, text=True, check=False, timeout=300
    )


def test_help_lists_the_commands() -> None:
    done = run("--help")
    assert done.returncode == 0
    assert "demo" in done.stdout
    assert "env" in done.stdout


def test_env_names_versions_and_backends() -> None:
    facts = json.loads(run("env", "--json").stdout)
    assert facts["fastxattn"] == fastxattn.__version__
    assert "loaded" in facts["cpu kernels"]


def test_demo_agrees_with_eager_and_draws_its_chart(tmp_path: Path) -> None:
    done = run("demo", "--layers", "2", "--out", str(tmp_path), "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["agrees"]
    assert [(r["dtype"], r["provider"]) for r in result["rows"]] == [
        (dtype, provider) for dtype in ("float32", "bfloat16") for provider in ("eager, padded", "fastxattn")
    ]
    assert (tmp_path / "qformer.png").read_bytes().startswith(b"\x89PNG")


def test_an_unknown_command_fails() -> None:
    assert run("nonsense").returncode == 2
