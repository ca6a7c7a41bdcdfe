"""Backend choice, the native loader and its messages."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import subprocess
import sys

import pytest
import torch

from fastxattn.runtime import backend, env, native, triton

TABLE = (
    backend.Backend("cpu", lambda problem: None if problem == "small" else "the problem is too large"),
    backend.Backend("reference", lambda problem: None),
)


def run_python(code: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **variables}, capture_output=True, text=True, check=False
    )


def test_auto_takes_the_first_backend_that_supports_the_problem() -> None:
    assert backend.resolve("op", TABLE, "small", "auto") == "cpu"
    assert backend.resolve("op", TABLE, "large", "auto") == "reference"


def test_a_named_backend_is_refused_with_its_reason_and_never_replaced() -> None:
    with pytest.raises(RuntimeError, match="backend='cpu' cannot run this problem: the problem is too large"):
        backend.resolve("op", TABLE, "large", "cpu")


def test_an_unknown_backend_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match="backend must be auto or one of cpu, reference; got 'tpu'"):
        backend.resolve("op", TABLE, "small", "tpu")


def test_explain_lists_every_backend_and_marks_the_chosen_one() -> None:
    text = str(backend.explain("op", TABLE, "large", notes=["a note"]))
    assert "the problem is too large" in text
    assert "-> reference" in text
    assert "a note" in text
    assert backend.explain("op", TABLE, "large", "cpu").chosen == "none"


def test_use_backend_changes_auto_and_restores_it() -> None:
    with backend.use_backend("reference"):
        assert backend.resolve("op", TABLE, "small", "auto") == "reference"
        assert backend.resolve("op", TABLE, "small", "cpu") == "cpu"
    assert env.default_backend == "auto"
    with pytest.raises(ValueError, match="got 'tpu'"), backend.use_backend("tpu"):
        pass


def test_a_wrong_environment_setting_is_named() -> None:
    done = run_python("import fastxattn.runtime.env", FASTXATTN_BACKEND="tpu")
    assert "environment variable FASTXATTN_BACKEND must be one of auto" in done.stderr
    done = run_python("from fastxattn.runtime import native; native.cpu_library()", FASTXATTN_CPU_ISA="sse9")
    assert "environment variable FASTXATTN_CPU_ISA must be one of generic" in done.stderr


def test_missing_and_broken_libraries_have_different_messages(tmp_path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    absent = native._load(tmp_path / "libfastxattn_cpu.so", "the CPU kernels", "make native")
    assert absent.library is None
    assert "were not built" in str(absent.reason)
    assert "make native" in str(absent.reason)
    (tmp_path / "broken.so").write_bytes(b"not a library")
    broken = native._load(tmp_path / "broken.so", "the CPU kernels", "make native")
    assert "does not load" in str(broken.reason)
    assert torch.__version__ in str(broken.reason)


def test_forcing_an_instruction_set() -> None:
    assert "generic" in native.available_cpu_isas()
    best = native.active_cpu_isa()
    try:
        native.force_cpu_isa("generic")
        assert native.active_cpu_isa() == "generic"
        with pytest.raises(ValueError, match=r"name must be auto or one of generic.*got 'sse9'"):
            native.force_cpu_isa("sse9")
    finally:
        native.force_cpu_isa("auto")
    assert native.active_cpu_isa() == best


def test_environment_forces_the_instruction_set() -> None:
    code = "from fastxattn.runtime import native; print(native.active_cpu_isa())"
    assert run_python(code, FASTXATTN_CPU_ISA="generic").stdout.strip() == "generic"


def test_measured_peak_is_positive() -> None:
    assert native.peak_gflops(torch.float32) > 0
    assert native.peak_gflops(torch.bfloat16) > 0


@pytest.mark.parametrize(
    ("version", "said"), [("3.4.1", "triton 3.4.1 is installed, and the kernels need 3.5"), ("3.5.0", None)]
)
def test_an_old_triton_is_named(monkeypatch, version, said) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version)
    found = triton.missing.__wrapped__()
    assert found is None if said is None else said in found
