"""The command line, run as a user runs it."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

import fastxattn

ROOT = Path(__file__).parents[1]
COMMANDS = {"env", "explain", "demo", "bench", "report", "prune", "export", "verify", "inspect", "optimize", "tune"}


def shell(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """A process of its own, as a user starts it."""
    return subprocess.run(
        [sys.executable, "-m", "fastxattn", *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
        env={**os.environ, "TERMINAL_WIDTH": "200", **variables},
    )


def run(*arguments: str) -> Result:
    """The same command in this process, which has imported torch already."""
    from fastxattn.cli import app

    return CliRunner().invoke(app, list(arguments), prog_name="fastxattn")


def test_help_lists_the_commands_and_the_exit_codes() -> None:
    done = shell("--help")
    assert done.returncode == 0
    assert [name for name in COMMANDS if f" {name} " not in done.stdout] == []
    assert "Exit codes: 0" in done.stdout


def test_version() -> None:
    assert run("--version").stdout == f"{fastxattn.__version__}\n"


def test_every_command_has_help_with_an_example() -> None:
    from typer.main import get_command

    from fastxattn.cli.common import app

    commands = get_command(app).commands  # type: ignore[attr-defined]
    assert sorted(commands) == sorted(COMMANDS)
    for name, command in commands.items():
        assert command.help, name
        assert f"Example: fastxattn {name}" in command.epilog
        assert "--json" in {o for p in command.params for o in p.opts}, name


def test_env_names_versions_and_backends() -> None:
    facts = json.loads(shell("env", "--json").stdout)
    assert facts["fastxattn"] == fastxattn.__version__
    assert "loaded" in facts["cpu kernels"]


def test_explain_says_which_backend_and_why_not_the_others() -> None:
    done = run("explain", "attention", "--lengths-q", "8*32", "--lengths-k", "257,64,6*577", "--causal")
    assert done.exit_code == 0, done.stderr
    assert "attention: backend 'cpu'" in done.stdout
    refused = run("explain", "attention", "--dtype", "float64", "--backend", "cpu", "--json")
    assert refused.exit_code == 1
    verdicts = {v["backend"]: v["reason"] for v in json.loads(refused.stdout)["verdicts"]}
    assert "float64" in verdicts["cpu"]


@pytest.mark.parametrize(
    "op",
    [
        "importance",
        "co_attention",
        "absorbed_attention",
        "infonce",
        "sigmoid",
        "maxsim",
        "late_interaction",
        "topk",
        "select",
    ],
)
def test_explain_knows_every_operation(op: str) -> None:
    from fastxattn.cli.problems import Shape, problem

    call, arguments, options = problem(op, Shape((3, 0, 2), (4, 1, 0), 2, 2, 8, "float32", "cpu", False))
    assert fastxattn.explain(call, *arguments, **options).chosen == "cpu"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("nonsense",), "No such command"),
        (("explain", "nonsense"), "OP must be one of attention, importance"),
        (("explain", "attention", "--lengths-q", "3,x"), "--lengths-q must be lengths such as"),
        (("explain", "attention", "--lengths-q", "3"), "as many sequences as each other; got 1 and 8"),
        (("explain", "attention", "--dim", "0"), "at least 1 head and 1 channel"),
        (("explain", "attention", "--device", "cuda"), "torch sees no such device"),
        (("tune",), "no CUDA or ROCm device is visible"),
        (("report", "--results", "/nonexistent"), "results must be a folder of CSVs"),
        (("prune", "/nonexistent.png", "--out", "/tmp/never.png"), "nonexistent.png"),
        (("bench", "nonsense"), "NAME must be one of absorbed_attention, attention"),
    ],
)
def test_wrong_usage_is_one_message_and_exit_code_2(arguments: tuple[str, ...], said: str) -> None:
    done = run(*arguments)
    assert done.exit_code == 2
    assert said in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr


def test_an_installed_package_runs_benchmarks_in_a_checkout_only(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "fastxattn", tmp_path / "fastxattn", ignore=shutil.ignore_patterns("*.so"))
    script = tmp_path / "command.py"
    script.write_text("from fastxattn.cli import main\nmain()\n")
    env = {**os.environ, "PYTHONPATH": ""}

    def run(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
        line = [sys.executable, str(script), *arguments]
        return subprocess.run(line, cwd=cwd, env=env, capture_output=True, text=True, check=False, timeout=600)

    repository = re.search(r'^Homepage = "(.+)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    for command in ("bench", "report"):
        done = run(command, cwd=tmp_path)
        assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
        assert repository and f"git clone {repository[1]}" in done.stderr
    inside = run("report", "--out", str(tmp_path / "page.html"), cwd=ROOT)
    assert inside.returncode == 0, inside.stderr
    assert (tmp_path / "page.html").stat().st_size > 100_000


def test_shell_completion_completes_commands() -> None:
    asked = {"_FASTXATTN_COMPLETE": "complete_bash", "COMP_WORDS": "fastxattn ex", "COMP_CWORD": "1"}
    assert shell(**asked).stdout.split() == ["explain", "export"]


def test_demo_agrees_with_eager_and_draws_its_chart(tmp_path: Path) -> None:
    done = run("demo", "--layers", "2", "--out", str(tmp_path), "--json")
    assert done.exit_code == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["agrees"]
    assert [(r["dtype"], r["provider"]) for r in result["rows"]] == [
        (dtype, provider) for dtype in ("float32", "bfloat16") for provider in ("eager, padded", "fastxattn")
    ]
    assert (tmp_path / "qformer.png").read_bytes().startswith(b"\x89PNG")


def test_demo_takes_one_run_of_what_is_slow_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastxattn.demo.PATIENCE", 0.0)
    done = run("demo", "--layers", "1", "--out", str(tmp_path))
    assert done.exit_code == 0, done.stderr
    assert "bfloat16: a single run each" in " ".join(done.stdout.split())


FACTORY = """
import torch, fastxattn

class Attend(torch.nn.Module):
    def forward(self, q, k, v):
        return fastxattn.cross_attention(q, k, v)

def build():
    return Attend(), tuple(torch.randn(2, n, 2, 8) for n in (3, 5, 5))
"""


def test_an_onnx_file_from_export_to_optimize(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(FACTORY)
    done = run("export", "mine:build", "model.onnx", "--json")
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["nodes"] == {"Attention": 1}
    again = run("export", "mine:build", "model.onnx")
    assert (again.exit_code, "overwrite" in again.stderr) == (2, True)
    assert run("export", "mine:nothing", "other.onnx").exit_code == 2
    checked = run("verify", "mine:build", "model.onnx", "--json")
    assert (checked.exit_code, json.loads(checked.stdout)["ok"]) == (0, True)
    assert json.loads(run("inspect", "model.onnx", "--json").stdout)["accelerated"] == 1
    assert json.loads(run("optimize", "model.onnx", "--json").stdout)["path"] is None
