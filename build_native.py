"""Compiles csrc/ into shared libraries: ``python build_native.py [--tests | --cuda] [--sanitize] [--out DIR]``.

Every csrc/<op>/<op>_cpu.inl is compiled once per instruction set of csrc/core/cpu/isas.def, every *.cpp once. Files
are found by name and compiled in parallel; objects are kept in build/ with their dependency files, so that a second
build only compiles what changed. FASTXATTN_BUILD_ISAS=avx2 builds that instruction set and the generic one alone,
which is quicker while working on a kernel.

``--cuda``, or FASTXATTN_BUILD_CUDA=1 in an installation, builds the CUDA kernels (csrc/<op>/*.cu) with the nvcc in
$NVCC or on PATH; torch may be a CPU build. FASTXATTN_CUDA_ARCHS names the architectures, all of CUDA_ARCHS by default,
``native`` means those of this machine's GPUs; csrc/<op>/*_sm90_*.cu are compiled for 90a alone.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import platform
import re
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

# No -ffast-math: NaN and infinity carry meaning here. Contraction gives fused multiply-adds.
COMMON = [
    "-std=c++20",
    "-O3",
    "-fPIC",
    "-fvisibility=hidden",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=fast",
    f"-fmacro-prefix-map={ROOT}/=",
    "-Wall",
    "-Wextra",
    "-Wno-psabi",
    "-Wno-unused-function",
]

SANITIZE = ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer"]
SANITIZE_LINK = ["-fsanitize=address,undefined"]


class NativeBuildError(RuntimeError):
    """The native libraries cannot be built here; the message says what is missing."""


@dataclass(frozen=True)
class Isa:
    """A row of csrc/core/cpu/isas.def."""

    name: str
    machine: str
    flags: tuple[str, ...]
    macros: tuple[str, ...]


def _read_isas() -> dict[str, Isa]:
    table: dict[str, Isa] = {}
    rows = re.findall(r'^FXA_ROW\((\w+), (\w+), (\w+), "(.*?)"', (CSRC / "core/cpu/isas.def").read_text(), re.MULTILINE)
    for name, machine, base, flags in rows:
        below = table.get(base, Isa("", "", (), ()))
        macros = (*below.macros, f"-DFXA_ISA_{name.upper()}=1")
        table[name] = Isa(name, machine, (*below.flags, *flags.split()), macros)
    return table


ISAS = _read_isas()


@dataclass(frozen=True)
class Toolchain:
    """The compiler and the flags that follow from the machine."""

    cxx: list[str]
    machine: str
    isas: tuple[str, ...]  # slowest first, generic included

    @staticmethod
    def find() -> Toolchain:
        """The compiler in $CXX or on PATH, and the instruction sets it can compile for this machine."""
        cxx = shlex.split(os.environ.get("CXX", "")) or [shutil.which("g++") or shutil.which("clang++") or ""]
        if not cxx[0] or shutil.which(cxx[0]) is None:
            raise NativeBuildError("no C++ compiler found (looked for $CXX, g++, clang++)")
        machine = platform.machine().lower()
        machine = {"amd64": "x86_64", "arm64": "aarch64"}.get(machine, machine)
        chosen = os.environ.get("FASTXATTN_BUILD_ISAS", "").replace(",", " ").split() or ISAS
        isas = (i for i in ISAS.values() if i.machine == "any" or (i.machine == machine and i.name in chosen))
        return Toolchain(cxx, machine, tuple(i.name for i in isas if not i.flags or _accepts(cxx, i.flags)))


def _accepts(cxx: list[str], flags: tuple[str, ...]) -> bool:
    probe = [*cxx, "-std=c++20", *flags, "-x", "c++", "-", "-fsyntax-only"]
    return subprocess.run(probe, input=b"int main(){}", capture_output=True, check=False).returncode == 0


@dataclass(frozen=True)
class Unit:
    """A call of the compiler: a file with its own flags; a kernel body also with its instruction set."""

    source: Path
    flags: tuple[str, ...] = ()
    isa: str = ""

    def compile(self, tool: Toolchain, objects: Path) -> Path:
        """The object, compiled if the file, anything it includes or a flag changed."""
        flags = [*COMMON, *self.flags, f"-I{CSRC}"]
        if self.isa:
            flags += [*ISAS[self.isa].flags, f"-DFXA_ISA={self.isa}", *ISAS[self.isa].macros]
        else:
            flags.append("-DFXA_ISAS(X,...)=" + " ".join(f"X({isa},__VA_ARGS__)" for isa in tool.isas))
        key = hashlib.sha256(" ".join([*tool.cxx, *flags]).encode()).hexdigest()[:12]
        name = self.source.relative_to(ROOT).as_posix().replace("/", "__")
        obj = objects / ".".join(part for part in (name, self.isa, key, "o") if part)
        deps = obj.with_suffix(".d")
        if _fresh(obj, deps):
            return obj
        output = ["-MMD", "-MF", str(deps), "-o", str(obj), "-c", "-x", "c++", str(self.source)]
        done = subprocess.run([*tool.cxx, *flags, *output], capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise NativeBuildError(f"compiling {self.source.relative_to(ROOT)} failed:\n{done.stderr[-6000:]}")
        if done.stderr.strip():
            print(done.stderr, file=sys.stderr)
        return obj


def _fresh(obj: Path, deps: Path) -> bool:
    if not obj.exists() or not deps.exists():
        return False
    names = deps.read_text().replace("\\\n", " ").split(":", 1)[-1].split()
    built = obj.stat().st_mtime
    return all(Path(name).exists() and Path(name).stat().st_mtime <= built for name in names)


def link(tool: Toolchain, units: list[Unit], target: Path, objects: Path, flags: list[str], ready: list[Path]) -> None:
    """Compile ``units`` into ``objects`` and link them, and the objects that are ``ready``, into ``target``."""
    objects.mkdir(parents=True, exist_ok=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    jobs = int(os.environ.get("MAX_JOBS", os.cpu_count() or 1))
    with ThreadPoolExecutor(jobs) as pool:
        objs = [*pool.map(lambda unit: unit.compile(tool, objects), units), *ready]
    if target.exists() and all(o.stat().st_mtime <= target.stat().st_mtime for o in objs):
        return
    # Link beside the target and move it over, so that a process using the old library keeps its file.
    fresh = target.with_suffix(".tmp")
    command = [*tool.cxx, "-shared", *map(str, objs), "-o", str(fresh), *flags]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise NativeBuildError(f"linking {target.name} failed:\n{done.stderr[-4000:]}")
    fresh.replace(target)
    print(f"fastxattn: built {target.name} ({', '.join(tool.isas)})")


def kernel_units(tool: Toolchain, flags: tuple[str, ...] = ()) -> list[Unit]:
    """The torch-free kernels: everything under csrc/<op>/ and csrc/core/cpu that is not a binding."""
    plain = sorted(p for p in CSRC.glob("**/*.cpp") if p.parent.name != "bindings" and not p.stem.endswith("_torch"))
    bodies = sorted(CSRC.glob("**/*_cpu.inl"))
    units = [Unit(p, flags, isa) for p in bodies for isa in reversed(tool.isas)]
    return units + [Unit(p, flags) for p in plain]


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


def _torch_units(cuda: bool, flags: list[str]) -> list[Unit]:
    sources = sorted(s for s in CSRC.glob("**/*_torch.cpp") if s.stem.endswith("_cuda_torch") == cuda)
    if cuda:
        flags = [*flags, f'-DFXA_CUDA_ARCHS="{" ".join(cuda_archs())}"']
    return [Unit(source, tuple(flags)) for source in sources]


def build_cpu(target: Path, tool: Toolchain, sanitize: bool = False) -> Path:
    """libfastxattn_cpu.so: kernels plus their torch registrations."""
    flags, libraries = _torch_flags()
    more, objects = (SANITIZE, "build/obj-asan") if sanitize else ([], "build/obj-cpu")
    # Kernels get no torch flags, so that their objects are the ones that the other libraries link too.
    units = [*kernel_units(tool, tuple(more)), *_torch_units(False, flags + more)]
    link(tool, units, target / "libfastxattn_cpu.so", ROOT / objects, libraries + SANITIZE_LINK * sanitize, [])
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
    flags, libraries = _torch_flags()
    objects = ROOT / "build/obj-cuda"
    compiled = compile_kernels(nvcc, sorted(CSRC.glob("*/*.cu")), objects)
    libraries = [*cuda_runtime(nvcc), *libraries]
    link(tool, _torch_units(True, flags), target / "libfastxattn_cuda.so", objects, libraries, compiled)


def build_test_module(target: Path, tool: Toolchain, sanitize: bool) -> Path:
    """The pybind11 module over the torch-free cores, for the tests: NumPy arrays and a forced instruction set."""
    try:
        import pybind11
    except ImportError as error:
        raise NativeBuildError("the test module needs pybind11") from error
    include = (f"-isystem{pybind11.get_include()}", f"-isystem{sysconfig.get_paths()['include']}")
    more, objects = (tuple(SANITIZE), "build/obj-asan") if sanitize else ((), "build/obj-cpu")
    name = f"_fastxattn_native{sysconfig.get_config_var('EXT_SUFFIX')}"
    bindings = sorted((CSRC / "bindings").glob("test_module*.cpp"))
    units = [*kernel_units(tool, more), *(Unit(s, (*include, *more)) for s in bindings)]
    link(tool, units, target / name, ROOT / objects, SANITIZE_LINK * sanitize, [])
    return target / name


def ort_units(tool: Toolchain) -> list[Unit]:
    """The kernels and their ONNX Runtime operators, which need neither torch nor the runtime."""
    return [*kernel_units(tool), *(Unit(s) for s in sorted((CSRC / "bindings").glob("ort_*.cpp")))]


def build_ort(target: Path, tool: Toolchain) -> None:
    """libfastxattn_ort.so: the same kernels as ONNX Runtime operators."""
    link(tool, ort_units(tool), target / "libfastxattn_ort.so", ROOT / "build/obj-cpu", ["-pthread"], [])


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
