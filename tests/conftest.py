"""Fixtures that several files share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from fastxattn.runtime import native


@pytest.fixture(params=["reference", *(f"cpu:{isa}" for isa in native.available_cpu_isas())])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """The reference, and the CPU kernels on every instruction set of this machine."""
    name, _, isa = request.param.partition(":")
    if isa:
        native.force_cpu_isa(isa)
    yield name
    if isa:
        native.force_cpu_isa("auto")
