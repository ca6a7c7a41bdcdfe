"""Fixtures that several files share, and which tests ``make test`` leaves to ``make test-full``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from fastxattn.runtime import native

FULL = {
    "native/": "builds of minutes: sanitizers, out of memory, NEON in an emulator, CUDA kernels on a simulator",
    "offline/": "compiles Triton kernels for every architecture",
    "export/test_aoti.py": "compiles a package with AOTInductor",
    "export/test_library.py": "fuzzes the operator library in processes of its own",
    "export/test_models.py": "exports whole models",
    "integrations/test_models.py": "swaps every model of the zoo",
    "test_compositions_fresh.py": "every cell in a process of its own",
    "test_losses_random.py": "random problems",
    "test_operator_arguments.py::test_hostile_arguments": "random arguments in processes of their own",
    "test_pruning_random.py": "random problems",
    "test_soak.py": "every part of the soak",
}
"""Files, folders or tests, and why they take long. Every operation's contract on every backend is elsewhere."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if item.path.is_relative_to(here) and f"{item.path.relative_to(here)}::{item.name}".startswith(tuple(FULL)):
            item.add_marker(pytest.mark.full)


@pytest.fixture(params=["reference", *(f"cpu:{isa}" for isa in native.available_cpu_isas())])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """The reference, and the CPU kernels on every instruction set of this machine."""
    name, _, isa = request.param.partition(":")
    if isa:
        native.force_cpu_isa(isa)
    yield name
    if isa:
        native.force_cpu_isa("auto")
