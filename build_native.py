"""Compiles csrc/, one compiler call per file: ``python build_native.py [--tests | --cuda] [--sanitize] [--out DIR]``.

A file's instruction set is read off its name (``*_avx512bf16.cpp`` gets the AVX-512-BF16 flags), files are
compiled in parallel, and objects are kept in build/ with their dependency files, so that a second build only
compiles what changed. New kernels need no entry here: every csrc/<op>/*.cpp is found by name.
FASTXATTN_BUILD_ISAS=avx2 builds that instruction set and the generic one alone: quicker while working on a kernel.

``--cuda``, or FASTXATTN_BUILD_CUDA=1 in an installation, builds the CUDA kernels (csrc/<op>/*.cu) with the nvcc in
$NVCC or on PATH; torch may be a CPU build. FASTXATTN_CUDA_ARCHS names the architectures, all of CUDA_ARCHS by default,
``native`` means those of this machine's GPUs; csrc/<op>/*_sm90_*.cu are compiled for 90a alone.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
TORCH_TARGET = "0x020a000000000000ULL"  # libtorch stable ABI of torch 2.10
CUDA_ARCHS = ("80", "86", "89", "90a", "100")

AVX2 = ["-mavx2", "-mfma", "-mf16c", "-mbmi2"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512"]
X86_FLAGS = {
    "avx2": AVX2,
    "avx512": AVX512,
    "avx512bf16": [*AVX512, "-mavx512bf16"],
    "amx": [*AVX512, "-mavx512bf16", "-mamx-tile", "-mamx-bf16"],
}
# No -ffast-math: NaN and infinity carry meaning here. Contraction gives fused multiply-adds.
COMMON = [
    "-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math",
    "-ffp-contract=fast", f"-fmacro-prefix-map={ROOT}/=", "-Wall", "-Wextra", "-Wno-psabi", "-Wno-unused-function",
]  # fmt: skip

SANITIZE = ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer"]
SANITIZE_LINK = ["-fsanitize=address,undefined"]


class NativeBuildError(RuntimeError):
    """The native libraries cannot be built here; the message says what is missing."""


@dataclass(frozen=True)
class Toolchain:
    """The compiler and the flags that follow from the machine."""

    cxx: list[str]
    machine: str
    isas: tuple[str, ...]

    @staticmethod
    def find() -> Toolchain:
        """The compiler in $CXX or on PATH, and the instruction sets it can compile for this machine."""
        cxx = shlex.split(os.environ.get("CXX", "")) or [shutil.which("g++") or shutil.which("clang++") or ""]
        if not cxx[0] or shutil.which(cxx[0]) is None:
            raise NativeBuildError("no C++ compiler found (looked for $CXX, g++, clang++)")
        machine = platform.machine().lower()
        if machine in ("x86_64", "amd64"):
            isas = tuple(name for name, flags in X86_FLAGS.items() if _accepts(cxx, flags))
        elif machine in ("aarch64", "arm64"):
            isas = ("neon",)
        else:
            isas = ()
        if chosen := os.environ.get("FASTXATTN_BUILD_ISAS"):
            isas = tuple(isa for isa in isas if isa in chosen.split(","))
        return Toolchain(cxx, machine, isas)

    def have_macros(self) -> list[str]:
        """Defines that tell isa.h which kernels exist."""
        return [f"-DFXA_HAVE_{isa.upper()}=1" for isa in self.isas]


def _accepts(cxx: list[str], flags: list[str]) -> bool:
    probe = [*cxx, "-std=c++20", *flags, "-x", "c++", "-", "-fsyntax-only"]
    return subprocess.run(probe, input=b"int main(){}", capture_output=True, check=False).returncode == 0


def _isa_of(source: Path) -> str | None:
    last = source.stem.rsplit("_", 1)[-1]
    return last if last in ("generic", "neon", *X86_FLAGS) else None


def _compile(tool: Toolchain, source: Path, objects: Path, extra: list[str]) -> Path | None:
    """Compile one file if it or anything it includes changed; None when its instruction set is not for here."""
    isa = _isa_of(source)
    flags = [*COMMON, *tool.have_macros(), *extra, f"-I{CSRC}"]
    if isa is not None:
        if isa != "generic" and isa not in tool.isas:
            return None
        flags += [*X86_FLAGS.get(isa, []), f"-DFXA_ISA={isa}", f"-DFXA_ISA_{isa.upper()}=1"]
    key = hashlib.sha256(" ".join([*tool.cxx, *flags]).encode()).hexdigest()[:12]
    obj = objects / f"{source.relative_to(ROOT).as_posix().replace('/', '__')}.{key}.o"
    deps = obj.with_suffix(".d")
    if _fresh(obj, deps):
        return obj
    command = [*tool.cxx, *flags, "-MMD", "-MF", str(deps), "-c", str(source), "-o", str(obj)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise NativeBuildError(f"compiling {source.relative_to(ROOT)} failed:\n{done.stderr[-6000:]}")
    if done.stderr.strip():
        print(done.stderr, file=sys.stderr)
    return obj


def _fresh(obj: Path, deps: Path) -> bool:
    if not obj.exists() or not deps.exists():
        return False
    names = deps.read_text().replace("\\\n", " ").split(":", 1)[-1].split()
    built = obj.stat().st_mtime
    return all(Path(name).exists() and Path(name).stat().st_mtime <= built for name in names)


def _library(
    tool: Toolchain, sources: list[tuple[Path, list[str]]], target: Path, objects: Path, link: list[str],
    ready: list[Path] | None = None,
) -> None:  # fmt: skip
    """Compile ``sources``, each with its own extra flags, and link them with the objects that are ``ready``."""
    objects.mkdir(parents=True, exist_ok=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    jobs = int(os.environ.get("MAX_JOBS", os.cpu_count() or 1))
    with ThreadPoolExecutor(jobs) as pool:
        compiled = list(pool.map(lambda s: _compile(tool, s[0], objects, s[1]), sources))
    objs = [str(o) for o in (*compiled, *(ready or ())) if o is not None]
    if target.exists() and all(Path(o).stat().st_mtime <= target.stat().st_mtime for o in objs):
        return
    # Link beside the target and move it over, so that a process using the old library keeps its file.
    fresh = target.with_suffix(".tmp")
    done = subprocess.run(
        [*tool.cxx, "-shared", *objs, "-o", str(fresh), *link], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise NativeBuildError(f"linking {target.name} failed:\n{done.stderr[-4000:]}")
    fresh.replace(target)
    print(f"fastxattn: built {target.name} ({', '.join(('generic', *tool.isas))})")


def _kernel_sources() -> list[Path]:
    """Torch-free kernels: everything under csrc/<op>/ and csrc/core/cpu that is not a binding."""
    found = (p for p in CSRC.glob("**/*.cpp") if CSRC / "bindings" not in p.parents)
    return sorted(p for p in found if not p.stem.endswith("_torch"))


def _torch_flags() -> tuple[list[str], list[str]]:
    try:
        import torch
    except ImportError as error:
        raise NativeBuildError("torch is not importable in the building environment") from error
    base = Path(torch.__file__).parent
    include = [f"-isystem{base}/include", f"-isystem{base}/include/torch/csrc/api/include"]
    if not (base / "include/torch/csrc/stable/library.h").exists():
        raise NativeBuildError(f"torch {torch.__version__} has no stable ABI headers; 2.10 or newer is needed")
    return [*include, f"-DTORCH_TARGET_VERSION={TORCH_TARGET}"], [f"-L{base}/lib", "-ltorch", "-ltorch_cpu", "-lc10"]


def _torch_sources(cuda: bool) -> list[Path]:
    return sorted(s for s in CSRC.glob("**/*_torch.cpp") if s.stem.endswith("_cuda_torch") == cuda)


def build_cpu(target: Path, tool: Toolchain, sanitize: bool = False) -> Path:
    """libfastxattn_cpu.so: kernels plus their torch registrations."""
    flags, link = _torch_flags()
    more, objects = (SANITIZE, "build/obj-asan") if sanitize else ([], "build/obj-cpu")
    # Kernels get no torch flags, so that their objects are the ones that the other libraries link too.
    sources = [*((s, more) for s in _kernel_sources()), *((s, flags + more) for s in _torch_sources(cuda=False))]
    _library(tool, sources, target / "libfastxattn_cpu.so", ROOT / objects, link + SANITIZE_LINK * sanitize)
    return target / "libfastxattn_cpu.so"


def find_nvcc() -> str:
    """The CUDA compiler in $NVCC or on PATH."""
    nvcc = os.environ.get("NVCC") or shutil.which("nvcc")
    if nvcc is None:
        raise NativeBuildError("no CUDA compiler found (looked for $NVCC and nvcc on PATH)")
    return nvcc


def cuda_flags(archs: tuple[str, ...]) -> list[str]:
    """nvcc's flags for code of these architectures, with PTX of the oldest for those to come."""
    codes = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in archs]
    if plain := [a for a in archs if not a.endswith("a")]:  # code for 90a runs on nothing else
        ptx = min(plain, key=int)
        codes.append(f"-gencode=arch=compute_{ptx},code=compute_{ptx}")
    return ["-std=c++20", "-O3", *codes, "-Xcompiler", "-fPIC,-fvisibility=hidden", f"-I{CSRC}"]


def _archs_of(source: Path, archs: tuple[str, ...]) -> tuple[str, ...]:
    """Of ``archs``, those that a file is for: ``*_sm90_*.cu`` has instructions that only sm_90a has."""
    return tuple(a for a in archs if a == "90a") if "_sm90_" in source.name else archs


def _compile_cuda(nvcc: str, source: Path, objects: Path, flags: list[str], threads: int = 1) -> Path:
    """Compile one file, ``threads`` architectures at a time; it takes minutes, so that an interrupted build resumes."""
    key = hashlib.sha256(" ".join([nvcc, *flags]).encode()).hexdigest()[:12]
    obj = objects / f"{source.relative_to(ROOT).as_posix().replace('/', '__')}.{key}.o"
    deps = obj.with_suffix(".d")
    if _fresh(obj, deps):
        return obj
    fresh, started = obj.with_suffix(".tmp.o"), time.monotonic()
    command = [nvcc, *flags, f"--threads={threads}", "-MMD", "-MF", str(deps), "-c", str(source), "-o", str(fresh)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise NativeBuildError(f"compiling {source.relative_to(ROOT)} failed:\n{done.stderr[-6000:]}")
    fresh.replace(obj)
    print(f"fastxattn: compiled {source.relative_to(CSRC)} in {time.monotonic() - started:.0f} s", flush=True)
    return obj


def cuda_archs() -> tuple[str, ...]:
    """FASTXATTN_CUDA_ARCHS, by default all of CUDA_ARCHS; ``native`` for what this machine's GPUs are."""
    asked = os.environ.get("FASTXATTN_CUDA_ARCHS", "")
    if asked == "native":
        command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
        asked = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        asked = " ".join(sorted(set(asked.replace(".", "").split()))).replace("90", "90a")
    return tuple(asked.replace(",", " ").split()) or CUDA_ARCHS


def compile_kernels(nvcc: str, sources: list[Path], objects: Path) -> list[Path]:
    """The objects of these .cu files for cuda_archs(), without the files that none of those is for."""
    objects.mkdir(parents=True, exist_ok=True)
    work = [(s, of) for s in sources if (of := _archs_of(s, cuda_archs()))]
    jobs = int(os.environ.get("MAX_JOBS", os.cpu_count() or 1))
    threads = -(-jobs // len(work))
    with ThreadPoolExecutor(jobs) as pool:
        return list(pool.map(lambda w: _compile_cuda(nvcc, w[0], objects, cuda_flags(w[1]), threads), work))


def cuda_runtime(nvcc: str) -> list[str]:
    """What links the runtime in; the driver is found by it when the first kernel is launched."""
    plan = subprocess.run([nvcc, "--dryrun", "-shared", "x.o"], capture_output=True, text=True, check=False).stderr
    folders = [word.strip('"') for word in plan.split() if word.strip('"').startswith("-L")]
    return [*folders, "-lcudart_static", "-ldl", "-lrt", "-pthread"]


def build_cuda(target: Path, tool: Toolchain) -> None:
    """libfastxattn_cuda.so: the CUDA kernels as a fat binary, and their torch registrations. Needs no GPU."""
    nvcc = find_nvcc()
    flags, link = _torch_flags()
    objects = ROOT / "build/obj-cuda"
    compiled = compile_kernels(nvcc, sorted(CSRC.glob("*/*.cu")), objects)
    known = f'-DFXA_CUDA_ARCHS="{" ".join(cuda_archs())}"'
    sources = [(s, [*flags, known] if s.stem == "library_cuda_torch" else flags) for s in _torch_sources(cuda=True)]
    _library(tool, sources, target / "libfastxattn_cuda.so", objects, [*cuda_runtime(nvcc), *link], compiled)


def build_test_module(target: Path, tool: Toolchain, sanitize: bool) -> Path:
    """The pybind11 module over the torch-free cores, for the tests: NumPy arrays and a forced instruction set."""
    try:
        import pybind11
    except ImportError as error:
        raise NativeBuildError("the test module needs pybind11") from error
    include = [f"-isystem{pybind11.get_include()}", f"-isystem{sysconfig.get_paths()['include']}"]
    more, objects = (SANITIZE, "build/obj-asan") if sanitize else ([], "build/obj-cpu")
    name = f"_fastxattn_native{sysconfig.get_config_var('EXT_SUFFIX')}"
    bindings = sorted((CSRC / "bindings").glob("test_module*.cpp"))
    sources = [*((s, more) for s in _kernel_sources()), *((s, include + more) for s in bindings)]
    _library(tool, sources, target / name, ROOT / objects, SANITIZE_LINK * sanitize)
    return target / name


def build_ort(target: Path, tool: Toolchain) -> None:
    """libfastxattn_ort.so: the same kernels as ONNX Runtime operators; needs neither torch nor the runtime."""
    sources = [*_kernel_sources(), *sorted((CSRC / "bindings").glob("ort_*.cpp"))]
    _library(tool, [(s, []) for s in sources], target / "libfastxattn_ort.so", ROOT / "build/obj-cpu", ["-pthread"])


def build_all(target: Path) -> None:
    """Every library a wheel ships; the CUDA kernels when FASTXATTN_BUILD_CUDA=1 asks for them."""
    tool = Toolchain.find()
    build_ort(target, tool)
    build_cpu(target, tool)
    if os.environ.get("FASTXATTN_BUILD_CUDA", "0") == "1":
        build_cuda(target, tool)


def main() -> None:
    """Command line; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "fastxattn/_lib")
    parser.add_argument("--tests", action="store_true", help="build the pybind11 test module instead")
    parser.add_argument("--cuda", action="store_true", help="build the CUDA kernels instead")
    parser.add_argument("--sanitize", action="store_true", help="with AddressSanitizer and UBSan")
    options = parser.parse_args()
    try:
        if options.tests:
            build_test_module(options.out, Toolchain.find(), options.sanitize)
        elif options.cuda:
            build_cuda(options.out, Toolchain.find())
        elif options.sanitize:
            build_cpu(options.out, Toolchain.find(), sanitize=True)
        else:
            build_all(options.out)
    except NativeBuildError as error:
        raise SystemExit(f"fastxattn: {error}") from error


if __name__ == "__main__":
    main()
