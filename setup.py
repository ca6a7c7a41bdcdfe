"""Builds the native libraries next to the Python package: fastxattn/_lib/libfastxattn_{cpu,ort}.so.

They are plain shared libraries on libtorch's stable ABI, not Python extension modules, so one wheel serves
every Python and every torch from 2.10 on. Without a compiler, or without torch in the building environment,
the package is built without them and says so: everything then runs on the reference backend.

Environment: FASTXATTN_BUILD_NATIVE=0 skips the native build, =1 makes its failure fatal;
FASTXATTN_BUILD_CUDA=1 adds the CUDA library; MAX_JOBS limits parallel compilation; CXX names the compiler.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py
from setuptools.dist import Distribution

ROOT = Path(__file__).parent
sys.path.insert(0, str(ROOT))
from build_native import NativeBuildError, build_all  # noqa: E402  (the build's own module, not shipped)


def build_libraries(target: Path) -> bool:
    """Build into ``target``; False, with a message, when this environment cannot."""
    mode = os.environ.get("FASTXATTN_BUILD_NATIVE", "auto")
    if mode == "0":
        print("fastxattn: native build skipped (FASTXATTN_BUILD_NATIVE=0)")
        return False
    try:
        build_all(target)
    except NativeBuildError as error:
        if mode == "1":
            raise SystemExit(f"fastxattn: the native build failed: {error}") from error
        print(
            f"\nfastxattn: WARNING: built WITHOUT the native CPU kernels: {error}\n"
            "  The package works, on the much slower reference backend. To get the kernels: install a C++20\n"
            "  compiler and torch, then reinstall with `pip install --no-build-isolation .`\n",
            file=sys.stderr,
        )
        return False
    return True


class BuildWithNative(build_py):
    """build_py that also compiles the native libraries into the package."""

    def run(self) -> None:
        """Copy the Python files, then compile."""
        super().run()
        # An editable install imports the package from the source tree, so the libraries belong there.
        package = ROOT / "fastxattn" if self.editable_mode else Path(self.build_lib) / "fastxattn"
        build_libraries(package / "_lib")


class PlatformDistribution(Distribution):
    """Marks the wheel as platform specific although it has no Python extension module."""

    def has_ext_modules(self) -> bool:
        """Whether this distribution carries compiled code."""
        return os.environ.get("FASTXATTN_BUILD_NATIVE", "auto") != "0"


def stable_abi_wheel() -> dict[str, type]:
    """The wheel tag ``py3-none-<platform>``: no CPython ABI is used."""
    try:
        from setuptools.command.bdist_wheel import bdist_wheel
    except ImportError:
        return {}

    class Wheel(bdist_wheel):
        def get_tag(self) -> tuple[str, str, str]:
            return "py3", "none", super().get_tag()[2]

    return {"bdist_wheel": Wheel}


if __name__ == "__main__":
    setup(
        cmdclass={"build_py": BuildWithNative, **stable_abi_wheel()},
        distclass=PlatformDistribution,
    )
