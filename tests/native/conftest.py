from __future__ import annotations

import dataclasses
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from fastxattn.runtime import native as native_runtime

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(Path(__file__).parent))


def build(out: Path, sanitize: bool) -> Path:
    sys.path.insert(0, str(ROOT))
    import build_native

    try:
        tool = build_native.Toolchain.find()
        # What this processor cannot run need not be compiled again for the tests.
        usable = tuple(isa for isa in tool.isas if isa in native_runtime.available_cpu_isas())
        return build_native.build_test_module(out, dataclasses.replace(tool, isas=usable or tool.isas), sanitize)
    except build_native.NativeBuildError as error:
        if "no C++ compiler" in str(error) or "needs pybind11" in str(error):
            pytest.skip(str(error))
        raise


@pytest.fixture(scope="session")
def native() -> ModuleType:
    """The native test module, built once."""
    path = build(ROOT / "build/test-module", sanitize=False)
    spec = importlib.util.spec_from_file_location("_fastxattn_native", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def sanitized_module_dir() -> Path:
    """Where the module built with AddressSanitizer and UBSan lies."""
    return build(ROOT / "build/test-module-asan", sanitize=True).parent


@pytest.fixture(scope="session")
def simt() -> Any:
    """The CUDA kernels under the SIMT runner; see simt/README.md."""
    sys.path.insert(0, str(ROOT))
    from simt.build import load

    import build_native

    try:
        return load()
    except build_native.NativeBuildError as error:
        if "no C++ compiler" in str(error):
            pytest.skip(str(error))
        raise
