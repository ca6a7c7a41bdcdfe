"""Compiles every Triton kernel at every shipped configuration, without a GPU, and reads the machine code.

``python benchmarks/offline.py [--arch sm_90] [--match .forward.fp16.] [--csv benchmarks/results/offline.csv --resume]``
writes one row
per kernel, configuration and architecture: registers, spilled bytes, shared memory, occupancy, instructions, and the
matrix instruction found. tests/offline holds the same rows to the gates.
"""

from __future__ import annotations

import argparse
import csv
import os
import re
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import offline_losses

RESULTS = Path(__file__).parent / "results/offline.csv"
TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
MATRIX = re.compile(r"\b(HMMA|HGMMA|UTCHMMA|v_mfma_\w+|FFMA2?|v_(?:pk_)?fma\w*_f32)\b")
SHARED_LIMIT = {"sm_80": 166_912, "sm_90": 232_448, "sm_100": 232_448, "gfx942": 65_536}  # bytes a program may use
REGISTER_FILE = 65_536


@dataclass(frozen=True)
class Case:
    """One kernel as it would be launched."""

    op: str
    kernel: str
    dtype: str  # fp16 | fp32
    dim: int  # widest padded head dim
    variant: str  # which optional arguments are there
    tile: str


@dataclass(frozen=True)
class Row:
    """What the compiler made of a case on one architecture."""

    op: str
    kernel: str
    dtype: str
    dim: int
    variant: str
    tile: str
    arch: str
    registers: int
    spills: int
    shared: int
    occupancy: int
    instructions: int
    matrix: str

    def case(self) -> Case:
        """What was compiled."""
        return Case(self.op, self.kernel, self.dtype, self.dim, self.variant, self.tile)

    def faults(self) -> list[str]:
        """Why this row fails the gates; empty when it passes."""
        found = []
        if self.spills:
            found.append(f"spills {self.spills} bytes")
        if self.shared > SHARED_LIMIT[self.arch]:
            found.append(f"needs {self.shared} bytes of shared memory, {SHARED_LIMIT[self.arch]} exist")
        expected = expected_matrix(self.kernel, self.dtype, self.arch)
        if expected and not re.search(expected, self.matrix):
            found.append(f"no {expected} in the machine code (found {self.matrix or 'none'})")
        return found


def expected_matrix(kernel: str, dtype: str, arch: str) -> str | None:
    """The matrix instruction a kernel must use, as a pattern; None for kernels that multiply no matrices."""
    if kernel in ("merge", *offline_losses.NO_PRODUCT):
        return None
    if dtype == "fp32":
        return "FFMA|v_.*fma"
    return {"sm_80": "HMMA", "sm_90": "HMMA|HGMMA", "sm_100": "HMMA|UTCHMMA", "gfx942": "v_mfma"}[arch]


POINTERS = {
    "p_cu": "*i32",
    "p_used": "*i32",
    "p_index": "*i32",
    "p_slot": "*i32",
    "p_range": "*i32",
    "p_seed": "*i64",
    "p_lse": "*fp32",
    "p_dlse": "*fp32",
    "p_delta": "*fp32",
    "p_part": "*fp32",
    "p_key_bias": "*fp32",
    "p_center": "*fp32",
    "p_totals": "*fp32",
    "p_rests": "*fp32",
    "p_norm": "*fp32",
    "p_dkey_bias": "*fp32",
    "p_bias": "*fp32",
    "p_dbias": "*fp32",
    "p_row_weight": "*fp32",
    "p_seen": "*i32",
    "p_score": "*fp32",
    "p_grad": "*fp32",
    "p_scale": "*fp32",
}
INDICES = ("p_index_q", "p_index_k", "p_used_q", "p_used_k")
OPTIONAL = {
    "plain": INDICES,
    "rich": (
        *INDICES,
        "p_range",
        "p_key_bias",
        "p_bias",
        "p_seed",
        "p_dlse",
        "p_dkey_bias",
        "p_row_weight",
        "p_bias_x",
        "p_bias_y",
        "p_seed_x",
        "p_seed_y",
        "p_dbias_x",
    ),
}
ALWAYS_OPTIONAL = {*OPTIONAL["rich"], "p_slot_q", "p_slot_k"}


def cases(arch: str) -> Iterator[Case]:
    """Every configuration shipped for an architecture, with every argument its class of problems may have."""
    from fastxattn.ops.attention.triton import tiles
    from fastxattn.ops.co_attention import kernels_triton as co_attention
    from fastxattn.ops.importance import kernels_triton as importance

    for kernel, kind, dim, tile in tiles.shipped(arch == "sm_80"):
        dtype = "fp32" if kind.startswith("single") else "fp16"
        variant = "rich" if kind in ("rich", "single_rich") else "plain"
        yield Case("attention", kernel, dtype, dim, variant, _named(tile))
        if kernel == "split" and kind == "plain":
            merge = replace(tile, warps=tiles.MERGE_WARPS)
            yield Case("attention", "merge", dtype, dim, "plain", _named(merge))
        if kernel == "backward_query" and dtype == "fp32":
            yield Case("attention", "backward_sums", dtype, dim, variant, _named(tile))
    others = {("importance", "importance"): importance.TILES, ("co_attention", "backward"): co_attention.TILES}
    for (op, kernel), kinds in others.items():
        for kind, table in kinds.items():
            for dim, tile in table.items():
                yield Case(op, kernel, "fp32" if kind == "single" else "fp16", dim, "rich", _named(tile))

    yield from (Case(*facts) for facts in offline_losses.cases())


def _named(tile: Any) -> str:
    return f"{tile.block_m}x{tile.block_n} w{tile.warps} s{tile.stages}"


def compile_case(case: Case, arch: str) -> Row:
    """Compile one case for one architecture and read the result."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from fastxattn.ops.attention.triton import tiles

    kernel, constants = _kernel_of(case)
    block_m, block_n, warps, stages = (int(n) for n in re.findall(r"\d+", case.tile))
    constants |= {"BLOCK_M": block_m, "BLOCK_N": block_n}
    signature: dict[str, str] = {}
    constexprs: dict[Any, Any] = {}
    attributes: dict[Any, Any] = {}
    for i, name in enumerate(kernel.arg_names):
        absent = name in ALWAYS_OPTIONAL and name not in OPTIONAL[case.variant]
        if name.isupper() or absent or (name.startswith("p_norm") and case.dtype != "fp32"):
            signature[name] = "constexpr"
            constexprs[(i,)] = constants.get(name)
        else:
            signature[name] = _type_of(name, case)
            if name.startswith(("p_", "stride")) and signature[name] != "fp32":
                attributes[(i,)] = [["tt.divisibility", 16]]
    missing = [n for i, n in enumerate(kernel.arg_names) if n.isupper() and constexprs[(i,)] is None]
    if missing:
        raise KeyError(f"{case.kernel}: no value for {missing}")
    target = GPUTarget("hip", arch, 64) if arch.startswith("gfx") else GPUTarget("cuda", int(arch[3:]), 32)
    if case.op not in offline_losses.OPS:
        warps = tiles.warps_on(
            tiles.Tile(block_m, block_n, warps, stages), int(case.dtype[2:]) // 8, target.backend == "hip"
        )
    options = {"num_warps": warps, "num_stages": stages}
    done = triton.compile(ASTSource(kernel, signature, constexprs, attributes), target=target, options=options)
    read = _read_amd if arch.startswith("gfx") else _read_nvidia
    registers, spills, instructions, matrix = read(done)
    shared = int(done.metadata.shared)
    threads = warps * target.warp_size
    return Row(
        **asdict(case),
        arch=arch,
        registers=registers,
        spills=spills,
        shared=shared,
        occupancy=_occupancy(registers, shared, threads, arch),
        instructions=instructions,
        matrix=matrix,
    )


def _kernel_of(case: Case) -> tuple[Any, dict[str, Any]]:
    if case.op in offline_losses.OPS:
        return offline_losses.kernel_of(case.op, case.kernel, case.dtype)
    from fastxattn.ops.attention.triton import backward, forward, tiles
    from fastxattn.ops.co_attention import kernels_triton as co_attention
    from fastxattn.ops.importance import kernels_triton as importance

    kernels = {
        "forward": forward.attention_forward,
        "split": forward.attention_forward,
        "merge": forward.attention_merge,
        "backward_query": backward.attention_backward_query,
        "backward_key": backward.attention_backward_key,
        "backward_bias": backward.attention_backward_bias,
        "importance": importance.importance,
        "backward_sums": backward.attention_backward_sums,
        "backward": co_attention.co_attention_backward_rows,
    }
    full = case.variant == "rich"
    constants: dict[str, Any] = {
        "GROUP": 1,
        "SOFTCAP": True,
        "KEY_BIAS_HEADS": full,
        "HEAD_DIM": case.dim,
        "VALUE_DIM": case.dim,
        "BLOCK_D": case.dim,
        "BLOCK_DV": case.dim,
        "DIM_X": case.dim,
        "DIM_Y": case.dim,
        "BLOCK_X": case.dim,
        "BLOCK_Y": case.dim,
        "SPLITS": 8 if case.kernel in ("split", "merge") else 1,
        "SPLIT_KEYS": tiles.SPLIT_KEYS,
        "PRECISION": "ieee",
        "NEED_DQ": True,
        "BATCH_SHARED": True,
        "HEADS_SHARED": False,
        "ROWS_SHARED": False,
        "COLUMNS_SHARED": False,
    }
    return kernels[case.kernel], constants


def _type_of(name: str, case: Case) -> str:
    if name in ("p_lse", "p_part_lse") and case.dtype == "fp32" and case.kernel in ("forward", "split", "merge"):
        return "*fp64"
    if name.startswith("p_"):
        pointers = POINTERS | (offline_losses.pointers(case.kernel) if case.op in offline_losses.OPS else {})
        known = [prefix for prefix in pointers if name.startswith(prefix)]
        return pointers[max(known, key=len)] if known else f"*{case.dtype}"
    return "fp32" if name in ("scale", "softcap", "dropout_p", "smooth") else "i32"


def _tool(name: str) -> str:
    import triton

    return str(Path(triton.__file__).parent / "backends/nvidia/bin" / name)


def _read_nvidia(done: Any) -> tuple[int, int, int, str]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(done.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [_tool("cuobjdump"), "-res-usage", file.name], capture_output=True, text=True, check=True
        )
        code = subprocess.run([_tool("nvdisasm"), "-c", file.name], capture_output=True, text=True, check=True).stdout
    text = usage.stdout + usage.stderr
    registers, stack = (int(re.search(pattern, text)[1]) for pattern in (r"REG:(\d+)", r"STACK:(\d+)"))  # type: ignore[index]
    spilled = len(re.findall(r"\bSTL\b", code))
    opcodes = re.findall(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]+)", code, re.MULTILINE)
    return registers, stack if spilled else 0, len(opcodes), _matrices(code)


def _read_amd(done: Any) -> tuple[int, int, int, str]:
    text = done.asm["amdgcn"]
    registers = int(re.search(r"\.vgpr_count:\s+(\d+)", text)[1])  # type: ignore[index]
    spills = 4 * int(re.search(r"\.vgpr_spill_count:\s+(\d+)", text)[1])  # type: ignore[index]
    code = text.split(".amdhsa_kernel")[0]
    return registers, spills, len(re.findall(r"^\t[a-z]\w+", code, re.MULTILINE)), _matrices(code)


def _matrices(code: str) -> str:
    return " ".join(sorted(set(MATRIX.findall(code))))


def _occupancy(registers: int, shared: int, threads: int, arch: str) -> int:
    """Programs that fit on one multiprocessor by registers, shared memory and threads."""
    if arch.startswith("gfx"):
        waves = 8 if registers <= 64 else max(1, 512 // registers)
        return max(1, min(waves * 4 * 64 // threads, 65_536 // max(shared, 1)))
    total_shared = {"sm_80": 167_936, "sm_90": 233_472, "sm_100": 233_472}[arch]
    by_registers = REGISTER_FILE // (-(-registers // 8) * 8 * threads)
    return min(by_registers, total_shared // (shared + 1024), 2048 // threads, 32)


def _compile(job: tuple[Case, str]) -> Row | str:
    try:
        return compile_case(*job)
    except Exception as error:  # a failed compilation is a result here
        return f"{job[0]} on {job[1]}: {type(error).__name__}: {str(error)[-400:]}"


def run(
    archs: tuple[str, ...] = TARGETS, match: str = "", known: Iterable[Row] = (), table: Path | None = None
) -> tuple[list[Row], list[str]]:
    """Rows of the cases whose ``op.kernel.dtype.variant.dim`` contains ``match``, and messages of what failed.

    Those among ``known`` are not compiled again and not returned. ``table`` is written after every row: a run that is
    cut short can be resumed.
    """
    known = list(known)
    done_before = {(row.case(), row.arch) for row in known}
    todo = [
        (c, arch)
        for arch in archs
        for c in cases(arch)
        if match in f"{c.op}.{c.kernel}.{c.dtype}.{c.variant}.{c.dim}." and (c, arch) not in done_before
    ]
    with ProcessPoolExecutor(int(os.environ.get("MAX_JOBS", os.cpu_count() or 1))) as pool:
        rows: list[Row] = []
        errors: list[str] = []
        for done in pool.map(_compile, todo, chunksize=1):
            if isinstance(done, str):
                errors.append(done)
            else:
                rows.append(done)
                if table is not None:
                    write(table, [*known, *rows])
    return rows, errors


def read(path: Path) -> list[Row]:
    """The rows of a table."""
    kinds = {f.name: int if f.type == "int" else str for f in fields(Row)}
    with path.open() as file:
        return [Row(**{k: kinds[k](v) for k, v in row.items()}) for row in csv.DictReader(file)]


def write(path: Path, rows: list[Row]) -> None:
    """A table of what is shipped, by architecture and in the order of the cases."""
    order = {(case, arch): i for arch in TARGETS for i, case in enumerate(cases(arch))}
    shipped = [row for row in rows if (row.case(), row.arch) in order]
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [f.name for f in fields(Row)], lineterminator="\n")
        writer.writeheader()
        shipped.sort(key=lambda row: (TARGETS.index(row.arch), order[row.case(), row.arch]))
        writer.writerows(asdict(row) for row in shipped)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arch", choices=TARGETS, action="append")
    parser.add_argument(
        "--match", "--kernel", default="", help="only cases whose op.kernel.dtype.variant.dim. contains this"
    )
    parser.add_argument("--csv", type=Path, help="write the rows here")
    parser.add_argument("--resume", action="store_true", help="keep the rows that the CSV has of cases still shipped")
    options = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise SystemExit("offline.py compiles; unset TRITON_INTERPRET")
    known = read(options.csv) if options.resume and options.csv and options.csv.exists() else []
    rows, errors = run(tuple(options.arch or TARGETS), options.match, known, options.csv)
    for row in rows:
        print(*(f"{value}" for value in asdict(row).values()), "; ".join(row.faults()) or "ok", sep=", ")
    for message in errors:
        print("FAILED", message)
    if errors or any(row.faults() for row in rows):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
