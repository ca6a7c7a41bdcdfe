"""NEON: every kernel compiles, and attention and importance agree with the generic ones on an emulated processor."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

import build_native

COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64-static"
DRIVER = Path(__file__).parent / "neon_driver.cpp"


@pytest.mark.skipif(not shutil.which(COMPILER) or not shutil.which(EMULATOR), reason=f"needs {COMPILER}, {EMULATOR}")
def test_neon_agrees_with_generic(tmp_path: Path) -> None:
    launcher = ["ccache"] if shutil.which("ccache") else []
    tool = build_native.Toolchain([*launcher, COMPILER], "aarch64", ("generic", "neon"))
    flags = ("-O1", "-Werror")
    units = [*build_native.kernel_units(tool, flags), build_native.Unit(DRIVER, flags)]
    objects = [str(unit.compile(tool, tmp_path)) for unit in units]
    assert len(objects) > 20, "the kernels are not where this test looks for them"
    program = tmp_path / "driver"
    subprocess.run([COMPILER, "-static", *objects, "-o", str(program)], check=True)
    done = subprocess.run([EMULATOR, str(program)], capture_output=True, text=True, check=False, env=dict(os.environ))
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.strip() == "neon agrees with generic"
