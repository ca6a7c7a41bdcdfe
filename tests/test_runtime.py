"""Backend choice, the native loader and its messages."""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import os
import re
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import fastxattn
from fastxattn.runtime import backend, env, native, triton

TABLE = (
    backend.Backend("cpu", lambda problem: None if problem == "small" else "the problem is too large", str),
    backend.Backend("reference", lambda problem: None, str),
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


def explained(problem: str = "large", requested: str = "auto") -> str:
    return backend.resolve("op", TABLE, problem, requested)


def test_explanations_nest_in_one_thread() -> None:
    inner = []

    def model() -> str:
        backend.note("of the outer call")
        inner.append(backend.explain_call(explained, "small").chosen)
        return explained("large")

    outer = backend.explain_call(model)
    assert inner == ["cpu"]
    assert outer.chosen == "reference"
    assert outer.notes == ("of the outer call",)
    assert backend.explaining_in is None


def test_other_threads_run_and_explain_while_one_explains() -> None:
    with ThreadPoolExecutor(2) as pool:

        def model() -> str:
            assert pool.submit(explained).result(60) == "reference"
            assert pool.submit(backend.explain_call, explained, "small").result(60).chosen == "cpu"
            assert backend.explaining_in == 1
            return explained("large")

        assert backend.explain_call(model).chosen == "reference"
    assert backend.explaining_in is None


def test_an_error_leaves_no_explanation_open() -> None:
    def fails() -> None:
        with pytest.raises(ValueError, match="called none"):
            backend.explain_call(lambda: None)
        raise KeyError("of the model")

    with pytest.raises(KeyError, match="of the model"):
        backend.explain_call(fails)
    assert backend.explaining_in is None
    assert explained() == "reference"


def test_the_first_operation_is_explained_whatever_the_caller_catches() -> None:
    def falls_back() -> str:
        try:
            return explained("small")
        except Exception:
            pytest.fail("nothing is computed, a fallback neither")

    def swallows() -> str:
        with contextlib.suppress(BaseException):
            explained("small")
        return explained("large")

    assert backend.explain_call(falls_back).chosen == "cpu"
    assert backend.explain_call(swallows).chosen == "cpu"


def test_operations_explain_and_compute_inside_an_explained_model() -> None:
    q = torch.randn(1, 4, 2, 8)
    seen = []

    def model(x: torch.Tensor) -> torch.Tensor:
        seen.append(fastxattn.explain(fastxattn.cross_attention, x, x, x, backend="reference").chosen)
        thread = threading.Thread(target=lambda: seen.append(fastxattn.cross_attention(x, x, x).shape))
        thread.start()
        thread.join(60)
        return fastxattn.cross_attention(x, x, x)

    assert fastxattn.explain(model, q).chosen == fastxattn.explain(fastxattn.cross_attention, q, q, q).chosen
    assert seen == ["reference", q.shape]
    whole = torch.compile(lambda x: fastxattn.cross_attention(x, x, x), backend="eager", fullgraph=True)
    assert fastxattn.explain(whole, q).op == "attention"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("flash", "names a backend that this operation lacks; it has cpu, .*reference"),
        ("cuda", "cannot run this problem: the tensors are on cpu"),
    ],
)
def test_a_default_backend_is_refused_by_the_name_of_its_variable(name: str, words: str) -> None:
    code = """
import torch, fastxattn
a = torch.randn(4, 8)
print(*fastxattn.explain(fastxattn.infonce_loss, a, a, 1.0).notes)
try:
    fastxattn.infonce_loss(a, a, 1.0)
except (RuntimeError, ValueError) as error:
    print(error)
"""
    done = run_python(code, FASTXATTN_BACKEND=name)
    note, message = done.stdout.splitlines()
    assert note == f"auto means {name}: environment variable FASTXATTN_BACKEND={name}"
    assert re.match(f"infonce_loss: environment variable FASTXATTN_BACKEND={name} {words}$", message), message
    assert "backend=" not in message


def test_use_backend_is_named_as_itself() -> None:
    with backend.use_backend("flash"), pytest.raises(ValueError, match=r"op: use_backend\('flash'\) names a backend"):
        backend.resolve("op", TABLE, "small", "auto")


def test_a_wrong_environment_setting_is_named() -> None:
    done = run_python("import fastxattn", FASTXATTN_VALIDATE="yes")
    assert "environment variable FASTXATTN_VALIDATE must be one of 0, 1; got 'yes'" in done.stderr
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
