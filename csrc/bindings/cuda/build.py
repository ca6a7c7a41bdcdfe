"""Builds libfastxattn_ort_cuda.so: ``python csrc/bindings/cuda/build.py [OUT]``. Needs nvcc; neither torch nor a GPU.

It holds what libfastxattn_ort.so holds, and attention for ONNX Runtime's CUDA provider.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT))

import build_native as native  # noqa: E402


def main(target: Path) -> None:
    """Compile the kernels for FASTXATTN_CUDA_ARCHS (by default all that the CUDA library has) and link them."""
    tool, nvcc, objects = native.Toolchain.find(), native.find_nvcc(), ROOT / "build/obj-ort-cuda"
    kernels = [*sorted(native.CSRC.glob("attention/*_sm80_*.cu")), native.CSRC / "bindings/cuda/ort_cuda.cu"]
    compiled = native.compile_kernels(nvcc, kernels, objects)
    define = ("-DFXA_ORT_CUDA=1",)
    units = [replace(u, flags=define) if u.source.stem == "ort_library" else u for u in native.ort_units(tool)]
    native.link(tool, units, target / "libfastxattn_ort_cuda.so", objects, native.cuda_runtime(nvcc), compiled)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "fastxattn/_lib")
