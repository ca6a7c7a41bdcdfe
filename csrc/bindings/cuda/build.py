"""Builds libfastxattn_ort_cuda.so: ``python csrc/bindings/cuda/build.py [OUT]``. Needs nvcc; neither torch nor a GPU.

It holds what libfastxattn_ort.so holds, and attention for ONNX Runtime's CUDA provider.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT))

import build_native as native  # noqa: E402


def main(target: Path) -> None:
    """Compile the kernels for FASTXATTN_CUDA_ARCHS (by default all that the CUDA library has) and link them."""
    tool, nvcc, objects = native.Toolchain.find(), native.find_nvcc(), ROOT / "build/obj-ort-cuda"
    objects.mkdir(parents=True, exist_ok=True)
    archs = tuple(os.environ.get("FASTXATTN_CUDA_ARCHS", "").replace(",", " ").split()) or native.CUDA_ARCHS
    kernels = [*sorted(native.CSRC.glob("attention/*.cu")), native.CSRC / "bindings/cuda/ort_cuda.cu"]
    compiled = [native._compile_cuda(nvcc, source, objects, native.cuda_flags(archs)) for source in kernels]
    sources = [*native._kernel_sources(), *sorted((native.CSRC / "bindings").glob("ort_*.cpp"))]
    define = ["-DFXA_ORT_CUDA=1"]
    extra = [(source, define if source.stem == "ort_library" else []) for source in sources]
    plan = subprocess.run([nvcc, "--dryrun", "-shared", "x.o"], capture_output=True, text=True, check=False).stderr
    folders = [word.strip('"') for word in plan.split() if word.strip('"').startswith("-L")]
    link = [*folders, "-lcudart_static", "-ldl", "-lrt", "-pthread"]
    native._library(tool, extra, target / "libfastxattn_ort_cuda.so", objects, link, compiled)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "fastxattn/_lib")
