"""Compiles the CUDA kernels without a GPU and reads the machine code.

``python benchmarks/cuda_offline.py [--arch sm_80] [--source sm80_f16] [--csv benchmarks/results/cuda_offline.csv]``
``python benchmarks/cuda_offline.py --library fastxattn/_lib/libfastxattn_cuda.so --csv ...`` reads a built library.

One row per kernel and architecture: registers, spilled bytes, shared memory, resident warps, which matrix and copy
instructions there are, and for the attention loop what one whole tile of keys executes: the shortest way round the loop
that multiplies and prefetches, from the control flow of the machine code. tests/native/test_cuda_compile.py holds the
rows to the gates.
"""

from __future__ import annotations

import argparse
import csv
import heapq
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks/results/cuda_offline.csv"
SHARED_PER_BLOCK = {"sm_80": 163, "sm_86": 99, "sm_89": 99, "sm_90a": 227, "sm_100": 227}  # KiB
SHARED_PER_SM = {"sm_80": 164, "sm_86": 100, "sm_89": 100, "sm_90a": 228, "sm_100": 228}  # KiB
SIZES = {"f16_t": 2, "bf16_t": 2, "float": 4}
EXPECTED = {2: ("HMMA", "LDSM", "LDGSTS"), 4: ("HMMA", "LDSM", "LDGSTS")}
TILE = 2 * 2 * 64 * 144
"""Bytes of the stages of csrc/core/cuda/tile.cuh."""
OTHERS = {  # shared memory and warps of the kernels without a head dim
    "select": (8192 * 4 + 256 * 4 + 64 * 4 + 256 * 4, 8),
    "merge": (0, 8),
    "match": (TILE + 4 * 64 * 4, 8),
    "maxsim": (TILE + 4 * 64 * 4 + 2 * 1024 * 4, 8),
    "contrastive_stats": (TILE, 8),
    "contrastive_slopes": (TILE, 8),
    "smooth_maxsim": (TILE + 4 * 64 * 4 + 2 * 1024 * 4, 8),
    "sigmoid": (TILE, 8),
    "smooth_weights": (TILE, 8),
    "contrastive_positives": (TILE, 8),
    "maxsim_gradient": (64 * 128 * 4, 8),
}
PRODUCTS = (
    "match",
    "maxsim",
    "smooth_maxsim",
    "smooth_weights",
    "contrastive_stats",
    "contrastive_slopes",
    "sigmoid",
    "contrastive_positives",
)
HMMA_CYCLES = 8
"""A sub-core of an A100 multiplies 256 16-bit pairs a cycle; m16n8k16 has 2048."""
WGMMA = "attention_forward_wgmma"
WGMMA_SLOTS, WGMMA_PAIRS = 4, 2048
"""Tiles of keys and values in csrc/attention/attention_wgmma.cuh; 16-bit pairs that an H100's SM multiplies a cycle."""


@dataclass(frozen=True)
class Row:
    """What the compiler made of one kernel on one architecture."""

    kernel: str
    dtype: str
    dim: int
    tile: str
    variant: str
    arch: str
    registers: int
    spills: int
    shared: int
    warps: int
    instructions: int
    opcodes: str
    loop: int
    loop_matrix: int
    loop_copies: int

    @property
    def issue_share(self) -> float:
        """Matrix instructions among those issued for a tile."""
        return self.loop_matrix / self.loop if self.loop else 0.0

    @property
    def time_share(self) -> float:
        """Time in the matrix unit when nothing overlaps: every other instruction one cycle."""
        busy = self.matrix_cycles
        return busy / (busy + self.loop - self.loop_matrix) if self.loop else 0.0

    @property
    def matrix_cycles(self) -> int:
        """Cycles that a tile keeps the matrix unit busy; a warp group's products occupy those of all four sub-cores."""
        if self.kernel != WGMMA:
            return self.loop_matrix * HMMA_CYCLES
        return 2 * 64 * int(self.tile.split("x")[1]) * self.dim // WGMMA_PAIRS

    def faults(self) -> list[str]:
        """Why this row fails the gates; empty when it passes."""
        found = []
        if self.spills:
            found.append(f"spills {self.spills} bytes")
        if self.shared > SHARED_PER_BLOCK[self.arch] * 1024:
            found.append(f"needs {self.shared} bytes of shared memory")
        expected: tuple[str, ...] = EXPECTED[SIZES[self.dtype]] if self.dim else ()
        if self.kernel in PRODUCTS:  # float32 is multiplied exactly, outside the matrix unit
            expected = EXPECTED[2] if SIZES[self.dtype] == 2 else ("LDGSTS", "FFMA")
        if self.kernel == "maxsim_gradient":
            expected = ("FFMA",)
        if self.kernel == WGMMA:
            expected = ("HGMMA", "LDGSTS", "UTMALDG")
        if expected:
            missing = [op for op in expected if op not in self.opcodes.split()]
            if missing:
                found.append(f"has no {' '.join(missing)}")
        return found


def compile_source(source: Path, arch: str, folder: Path) -> tuple[str, str]:
    """The compiler's report and the machine code of one file."""
    sys.path.insert(0, str(ROOT))
    from build_native import find_nvcc

    cubin = folder / f"{source.stem}.{arch}.cubin"
    flags = ["-std=c++20", "-O3", f"-arch={arch}", "-Xptxas", "-v", f"-I{ROOT / 'csrc'}", "-cubin"]
    done = subprocess.run(
        [find_nvcc(), *flags, "-o", str(cubin), str(source)], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise RuntimeError(f"{source.name} does not compile for {arch}:\n{done.stderr[-4000:]}")
    if "wgmma.mma_async instructions are serialized" in done.stderr:
        raise RuntimeError(f"{source.name}: the compiler serializes wgmma:\n{done.stderr[-4000:]}")
    code = subprocess.run([find_cuobjdump(), "-sass", str(cubin)], capture_output=True, text=True, check=True)
    return done.stderr, code.stdout


def find_cuobjdump() -> str:
    """On PATH, or the one that Triton ships."""
    if (found := shutil.which("cuobjdump")) is not None:
        return found
    import triton

    return str(Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump")


def resources(report: str) -> dict[str, tuple[int, int]]:
    """Registers and spilled bytes by mangled name, from ptxas -v."""
    pattern = re.compile(
        r"Function properties for (\S+)\n\s*\d+ bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads\n"
        r"ptxas info\s*: Used (\d+) registers"
    )
    return {m[1]: (int(m[4]), int(m[2]) + int(m[3])) for m in pattern.finditer(report)}


def rows_of_library(library: Path, arch: str) -> list[Row]:
    """The rows of a built library (or object file) for one architecture; without the compiler's report, ``spills`` is
    the stack that a kernel has, which spills would need."""

    def dump(what: str) -> str:
        command = [find_cuobjdump(), what, "-arch", arch, str(library)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    pattern = re.compile(r"Function (\S+):\n\s*REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)")
    used = {m[1]: (int(m[2]), int(m[3]) + int(m[4])) for m in pattern.finditer(dump("-res-usage"))}
    return [describe(name, found, arch, *used[name]) for name, found in functions(dump("-sass"))]


def functions(code: str) -> Iterator[tuple[str, list[tuple[int, str]]]]:
    """Mangled names and their instructions with addresses."""
    for part in code.split("Function : ")[1:]:
        name, _, rest = part.partition("\n")
        found = re.finditer(r"/\*([0-9a-f]{4,5})\*/\s+([^;]+);", rest)
        yield name.strip(), [(int(m[1], 16), m[2].strip()) for m in found]


def opcode(text: str) -> str:
    """The name of an instruction without its predicate and modifiers."""
    return re.sub(r"^@!?U?P\w+\s+", "", text).split()[0].split(".")[0]


def whole_tile(instructions: list[tuple[int, str]]) -> Counter[str]:
    """What the shortest way round a loop executes that has the most matrix instructions of any block, and copies."""
    places = {address: i for i, (address, _) in enumerate(instructions)}
    jumps: dict[int, tuple[int, bool]] = {}  # where from: where to, and whether it may also go on
    for i, (_, text) in enumerate(instructions):
        if opcode(text) in ("EXIT", "RET"):
            jumps[i] = (-1, text.startswith("@"))
        elif opcode(text) == "BRA" and (m := re.search(r"0x([0-9a-f]+)", text)) and int(m[1], 16) in places:
            divergent = text.startswith("@") or ".DIV" in text
            jumps[i] = (places[int(m[1], 16)], divergent)
    starts = sorted({0, *(i + 1 for i in jumps), *(to for to, _ in jumps.values() if to >= 0)} - {len(instructions)})
    ends = dict(zip(starts, [*starts[1:], len(instructions)], strict=True))
    counts = {s: Counter(opcode(t) for _, t in instructions[s:e]) for s, e in ends.items()}
    after: dict[int, list[int]] = {}
    for s, e in ends.items():
        to, goes_on = jumps.get(e - 1, (-1, True))
        after[s] = [t for t in (to, e if goes_on else -1) if t in ends]
    matrix = {s: c["HMMA"] + c["HGMMA"] for s, c in counts.items()}
    most = max(matrix.values(), default=0)
    # Where another warp fetches the tiles, the copies are of queries, before the loop.
    by_tma = any(c["HGMMA"] for c in counts.values())
    fetched = 0 if by_tma else max((c["LDGSTS"] for c in counts.values()), default=0)
    if most < 4:
        return Counter()
    best: tuple[int, Counter[str]] | None = None
    busy = [s for s, n in matrix.items() if n == most]
    for head in {to for i, (to, _) in jumps.items() if 0 <= to <= i and any(to <= b <= i for b in busy)}:
        # State: block, products and copies met; both keys and values are copied.
        queue: list[tuple[int, int, int, int, tuple[int, ...]]] = [(0, head, 0, 0, ())]
        seen: set[tuple[int, int, int]] = set()
        while queue:
            cost, block, products, copies, path = heapq.heappop(queue)
            if path and block == head:
                if products >= most and copies >= 2 * fetched:
                    total = sum((counts[b] for b in path), Counter[str]())
                    best = min(best, (cost, total), key=lambda x: x[0]) if best else (cost, total)
                    break
                continue
            if (block, products, copies) in seen:
                continue
            seen.add((block, products, copies))
            grown = min(products + matrix[block], 4 * most)
            cost += ends[block] - block
            met = min(copies + counts[block]["LDGSTS"], 2 * fetched)
            for to in after[block]:
                heapq.heappush(queue, (cost, to, grown, met, (*path, block)))
    return best[1] if best else Counter()


def rows_of(source: Path, arch: str, folder: Path) -> list[Row]:
    """The rows of one file on one architecture."""
    report, code = compile_source(source, arch, folder)
    used = resources(report)
    rows = []
    for name, instructions in functions(code):
        registers, spills = used[name]
        rows.append(describe(name, instructions, arch, registers, spills))
    return rows


def describe(mangled: str, instructions: list[tuple[int, str]], arch: str, registers: int, spills: int) -> Row:
    """A row from a kernel's mangled name and machine code."""
    kernel = re.findall(r"\d([a-z][a-z_]*)_kernel", mangled)[-1]
    dtype = "f16_t" if "5f16_t" in mangled else "bf16_t" if "6bf16_t" in mangled else "float"
    numbers = [int(n) for n in re.findall(r"Li(\d+)E", mangled)]
    dim, rows, keys = numbers if len(numbers) == 3 else (0, 0, 0)
    forward = kernel.startswith("attention_forward")
    shared = ((1 if forward else 2) * rows + 4 * keys) * dim * SIZES[dtype] + (32 if forward else 16 + 40 * keys)
    warps = rows // 16 if dim else 4
    if kernel == WGMMA:  # and the queries, a barrier for full and one for empty, and the group that fetches
        shared, warps = (rows + WGMMA_SLOTS * keys) * dim * 2 + 16 * WGMMA_SLOTS, warps + 4
    if not dim:
        shared, warps = OTHERS.get(kernel, (0, 4))
    granted = -(-registers // 8) * 8 * 32 * warps
    blocks = min(65536 // granted, SHARED_PER_SM[arch] * 1024 // (shared + 1024))
    ops = Counter(opcode(t) for _, t in instructions)
    variant = "rich" if "Lb1E" in mangled else "plain"
    tile: Counter[str] = whole_tile(instructions) if dim and variant == "plain" else Counter()
    matrix = sorted(
        op for op in ops if op in ("HMMA", "HGMMA", "LDSM", "LDGSTS", "UTMALDG") or (op == "FFMA" and not dim)
    )
    return Row(
        kernel,
        dtype,
        dim,
        f"{rows}x{keys}" if dim else "",
        variant,
        arch,
        registers,
        spills,
        shared,
        min(blocks * warps, 48 if arch in ("sm_86", "sm_89") else 64),
        len(instructions),
        " ".join(matrix),
        tile.total(),
        tile["HMMA"] + tile["HGMMA"],
        tile["LDGSTS"],
    )


def main() -> None:
    """Command line; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arch", action="append", choices=sorted(SHARED_PER_BLOCK))
    parser.add_argument("--source", default="", help="only files whose name contains this")
    parser.add_argument(
        "--csv", type=Path, help="write the rows here; what it holds of other kernels and architectures stays"
    )
    parser.add_argument("--library", type=Path, help="read this library instead of compiling")
    options = parser.parse_args()
    sources = [s for s in sorted((ROOT / "csrc").glob("*/*.cu")) if options.source in s.name]
    archs = options.arch or sorted(SHARED_PER_BLOCK)
    jobs = [(s, a) for a in archs for s in sources if a == "sm_90a" or "_sm90_" not in s.name]
    if options.library:
        rows = [row for arch in archs for row in rows_of_library(options.library, arch)]
    else:
        with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(2) as pool:
            rows = [r for found in pool.map(lambda j: rows_of(*j, Path(folder)), jobs) for r in found]
    for row in rows:
        share = f", {row.issue_share:.0%} of issues, {row.time_share:.0%} of time" if row.loop else ""
        print(f"{row}{share}: {', '.join(row.faults()) or 'ok'}")
    if options.csv:
        key = ("kernel", "dtype", "dim", "tile", "variant", "arch")
        table = {}
        if options.csv.exists():
            with options.csv.open(newline="") as file:
                table = {tuple(row[k] for k in key): row for row in csv.DictReader(file)}
        table |= {tuple(str(getattr(row, k)) for k in key): asdict(row) for row in rows}
        with options.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, [f.name for f in fields(Row)])
            writer.writeheader()
            writer.writerows(table.values())
    if any(row.faults() for row in rows):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
