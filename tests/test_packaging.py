"""Installation without a compiler gives a working pure-Python package and says what is missing."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import fastxattn

ROOT = Path(__file__).parents[1]


def build(tmp_path: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    source = tmp_path / "source"
    if not source.exists():
        skip = shutil.ignore_patterns("*.so", "__pycache__", "build")
        source.mkdir()
        for name in ("setup.py", "build_native.py", "pyproject.toml", "README.md", "LICENSE"):
            shutil.copy(ROOT / name, source)
        for name in ("fastxattn", "csrc"):
            shutil.copytree(ROOT / name, source / name, ignore=skip)
    return subprocess.run(
        [sys.executable, "setup.py", "-q", "bdist_wheel", "--dist-dir", str(tmp_path / "dist")],
        cwd=source,
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        check=False,
    )


def test_without_a_compiler_the_package_works_on_the_reference(tmp_path: Path) -> None:
    done = build(tmp_path, CXX="/nonexistent/c++")
    assert done.returncode == 0, done.stderr
    assert "built WITHOUT the native CPU kernels: no C++ compiler found" in done.stderr
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    assert wheel.name.split("-")[2:4] == ["py3", "none"]
    installed = tmp_path / "installed"
    shutil.unpack_archive(wheel, installed, "zip")
    code = """
import torch, fastxattn
from fastxattn.runtime import native
assert "were not built" in native.cpu_library().reason, native.cpu_library()
q, cu = torch.randn(3, 2, 8), torch.tensor([0, 1, 3], dtype=torch.int32)
out = fastxattn.varlen_cross_attention(q, q, q, cu, cu)
print(fastxattn.__file__, torch.allclose(out[0], q[0]))
"""
    ran = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.stdout.split() == [str(installed / "fastxattn/__init__.py"), "True"], ran.stderr


def test_a_required_native_build_that_cannot_happen_is_an_error(tmp_path: Path) -> None:
    done = build(tmp_path, CXX="/nonexistent/c++", FASTXATTN_BUILD_NATIVE="1")
    assert done.returncode != 0
    assert "the native build failed: no C++ compiler found" in done.stderr


def test_the_version_is_the_same_everywhere() -> None:
    check = [sys.executable, str(ROOT / ".ci/check_wheels.py"), "--tag"]
    good = subprocess.run([*check, f"v{fastxattn.__version__}"], capture_output=True, text=True, check=False)
    assert good.returncode == 0, good.stderr
    bad = subprocess.run([*check, "v99.0"], capture_output=True, text=True, check=False)
    assert bad.returncode != 0
    assert "versions differ" in bad.stderr


def test_workflows_call_what_a_developer_calls() -> None:
    """Each workflow is a thin caller: its commands are .ci/run and targets that the Makefile has."""
    yaml = pytest.importorskip("yaml")
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    workflows = sorted((ROOT / ".github/workflows").glob("*.yml"))
    assert {w.stem for w in workflows} == {"ci", "docs", "gpu", "release", "wheels"}
    for workflow in workflows:
        for job in yaml.safe_load(workflow.read_text())["jobs"].values():
            for command in (step["run"] for step in job.get("steps", []) if "run" in step):
                first, *rest = command.split()
                assert first in ("make", ".ci/run"), command
                assert {word for word in rest if "=" not in word} <= targets, command


@pytest.mark.parametrize(
    "name", ["SECURITY.md", "CONTRIBUTING.md", "LICENSE", "CHANGELOG.md", "CITATION.cff", "fastxattn/py.typed"]
)
def test_release_files_exist(name: str) -> None:
    assert (ROOT / name).exists()
