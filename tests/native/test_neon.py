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
OTHER_MACHINES = ("_avx2", "_avx512", "_avx512bf16", "_amx", "_torch")


def sources() -> list[Path]:
    """Every torch-free kernel file that an ARM build has."""
    found = build_native.CSRC.glob("**/*.cpp")
    return sorted(f for f in found if f.parent.name != "bindings" and not f.stem.endswith(OTHER_MACHINES))


@pytest.mark.skipif(not shutil.which(COMPILER) or not shutil.which(EMULATOR), reason=f"needs {COMPILER}, {EMULATOR}")
def test_neon_agrees_with_generic(tmp_path: Path) -> None:
    flags = [*build_native.COMMON, "-O1", "-Werror", "-DFXA_HAVE_NEON=1", f"-I{build_native.CSRC}"]
    objects = []
    for source in [*sources(), DRIVER]:
        isa = source.stem.rpartition("_")[2]
        own = [f"-DFXA_ISA={isa}", f"-DFXA_ISA_{isa.upper()}=1"] if isa in ("neon", "generic") else []
        objects.append(str(tmp_path / f"{source.parent.name}_{source.stem}.o"))
        launcher = ["ccache"] if shutil.which("ccache") else []
        command = [*launcher, COMPILER, *flags, *own, "-c", str(source), "-o", objects[-1]]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-4000:]
    assert len(objects) > 20, "the kernels are not where this test looks for them"
    program = tmp_path / "driver"
    subprocess.run([COMPILER, "-static", *objects, "-o", str(program)], check=True)
    done = subprocess.run([EMULATOR, str(program)], capture_output=True, text=True, check=False, env=dict(os.environ))
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.strip() == "neon agrees with generic"
