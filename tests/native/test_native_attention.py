"""The attention core without torch: instruction sets agree, memory is clean, results do not depend on threads."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import cases
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

# float32 sums in another order; a 16-bit weight or result may round the other way, once per product.
TOLERANCE = {"float32": 3e-5, "bfloat16": 4e-2, "float16": 5e-3}


@settings(max_examples=60, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**31))
def test_every_instruction_set_agrees_with_generic(native: ModuleType, seed: int) -> None:
    dtype = cases.make_case(seed)[2]["dtype"]
    expected = cases.run_case(native, seed, "generic")
    for isa in native.isas():
        for ours, theirs in zip(cases.run_case(native, seed, isa), expected, strict=True):
            assert np.array_equal(np.isfinite(ours), np.isfinite(theirs))
            finite = np.isfinite(theirs)
            if not finite.any():
                continue
            bound = TOLERANCE[dtype] * (1 + np.abs(theirs[finite]).max())
            np.testing.assert_allclose(ours[finite], theirs[finite], rtol=0, atol=bound)


@pytest.mark.parametrize("seed", range(0, 60, 5))
def test_results_do_not_depend_on_threads(native: ModuleType, seed: int) -> None:
    isa = native.isas()[-1]
    one = cases.run_case(native, seed, isa, workers=1)
    for workers in (2, 5):
        for a, b in zip(cases.run_case(native, seed, isa, workers), one, strict=True):
            np.testing.assert_array_equal(a, b)


def test_unseen_nan_reaches_nothing(native: ModuleType) -> None:
    """NaN in a key row that no query sees, or in a query row that sees nothing, changes no other result."""
    rng = np.random.default_rng(0)
    for dtype in ("float32", "bfloat16"):
        for rows in (3, 70):  # streamed and tiled
            query, key, value, grad = (rng.standard_normal((n, 2, 17)) for n in (rows, 150, 150, rows))
            seen = np.tile(np.array([[10, 140]], dtype=np.int32), (rows, 1))
            seen[1] = [5, 5]
            options = {
                "dtype": dtype,
                "cu_seqlens_q": np.array([0, rows], dtype=np.int32),
                "cu_seqlens_k": np.array([0, 150], dtype=np.int32),
                "kv_range": seen,
                "scale": 0.3,
            }

            def run(*arrays: np.ndarray, dtype: str = dtype, options: dict = options) -> list[np.ndarray]:
                *inputs, grad_out = (cases.as_dtype(a, dtype) for a in arrays)
                out, lse = native.attention(*inputs, native.isas()[-1], 1, **options)
                grads = native.attention_backward(grad_out, out, lse, *inputs, native.isas()[-1], 1, **options)
                return [lse, *(cases.from_bits(x, dtype) for x in (out, *grads[:3]))]

            clean = run(query, key, value, grad)
            for array in (key, value):
                array[[0, 9, 140, 149]] = np.nan
            query[1] = grad[1] = np.inf
            for dirty, expected in zip(run(query, key, value, grad), clean, strict=True):
                np.testing.assert_allclose(
                    dirty,
                    expected,
                    rtol=2e-2 if dtype == "bfloat16" else 1e-4,
                    atol=2e-2 if dtype == "bfloat16" else 1e-5,
                )
            assert np.isfinite(clean[1]).all()


@pytest.mark.skipif(sys.platform != "linux", reason="LD_PRELOAD of the sanitizer's runtime")
def test_sanitizers_find_nothing(sanitized_module_dir: Path) -> None:
    compiler = os.environ.get("CXX", "g++").split()[0]
    found = subprocess.run([compiler, "-print-file-name=libasan.so"], capture_output=True, text=True, check=True)
    env = dict(os.environ, LD_PRELOAD=found.stdout.strip(), ASAN_OPTIONS="detect_leaks=0", OPENBLAS_NUM_THREADS="1")
    script = Path(__file__).parent / "sanitized_run.py"
    done = subprocess.run(
        [sys.executable, str(script), str(sanitized_module_dir), "60"],
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.strip() == "clean"
