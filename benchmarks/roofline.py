"""Tables of docs/design/triton.md: offline figures and estimates. ``python -m benchmarks.roofline [--check]``.

A roofline estimate is the longer of two times: multiply-adds at the card's dense 16-bit peak, and every operand moved
once at its memory bandwidth. It is what no kernel can beat, and not a measurement.
"""

from __future__ import annotations

import csv
import re
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs/design/triton.md"
TABLE = ROOT / "benchmarks/results/offline.csv"
HEADS, DIM, BYTES = 16, 64, 2
# Dense bfloat16 TFLOP/s and TB/s of the vendors' data sheets.
CARDS = {"A100 80 GB": (312.0, 2.04), "H100 SXM": (989.0, 3.35), "B200": (2250.0, 8.0), "MI300X": (1307.0, 5.3)}
_PRODUCTS = {"forward": 2, "backward": 7, "importance": 1}
"""Matrix products of queries x keys x head dim: backward in two passes recomputes scores and dP in each."""


@dataclass(frozen=True)
class Work:
    """What one call has to do at least."""

    flops: float
    bytes: float

    def microseconds(self, peak: float, bandwidth: float) -> tuple[float, str]:
        """The roofline and which side of it binds."""
        compute, memory = self.flops / peak / 1e6, self.bytes / bandwidth / 1e6
        return (compute, "compute") if compute > memory else (memory, "memory")


def work(kernel: str, lengths_q: list[int], lengths_k: list[int]) -> Work:
    """Of a 16-bit call with HEADS heads of DIM."""
    pairs = sum(q * k for q, k in zip(lengths_q, lengths_k, strict=True))
    rows_q, rows_k = sum(lengths_q), sum(lengths_k)
    tensors = {"forward": 2 * rows_q + 2 * rows_k, "backward": 4 * rows_q + 4 * rows_k, "importance": rows_q + rows_k}
    return Work(2.0 * _PRODUCTS[kernel] * pairs * HEADS * DIM, float(tensors[kernel] * HEADS * DIM * BYTES))


def roofline_table() -> str:
    """Estimated least times of the GPU benchmark's shapes."""
    from benchmarks.gpu_cases import SHAPES

    lines = [f"| shape ({HEADS} heads of {DIM}, 16-bit) | kernel | " + " | ".join(CARDS) + " |"]
    lines.append("|---|---|" + "---|" * len(CARDS))
    for shape, (of_q, of_k) in SHAPES.items():
        for kernel in _PRODUCTS:
            cells = []
            for peak, bandwidth in CARDS.values():
                time, bound = work(kernel, of_q, of_k).microseconds(peak, bandwidth)
                cells.append(f"{time:.1f} us ({bound})")
            lines.append(f"| {shape} | {kernel} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def offline_table() -> str:
    """Registers, spills, shared memory (KiB), programs per multiprocessor and instructions, by target."""
    with TABLE.open() as file:
        rows = list(csv.DictReader(file))
    targets = list(dict.fromkeys(row["arch"] for row in rows))
    cells: dict[tuple[str, ...], dict[str, str]] = defaultdict(dict)
    for row in rows:
        key = (f"{row['op']} {row['kernel']}", f"{row['dtype']} {row['variant']}", row["dim"], row["tile"])
        matrix = next((name for name in ("UTCHMMA", "HGMMA", "HMMA", "v_mfma") if name in row["matrix"]), "FMA")
        cells[key][row["arch"]] = (
            f"{row['registers']} / {row['spills']} / {int(row['shared']) / 1024:.0f} / {row['occupancy']} / "
            f"{row['instructions']} {matrix if 'merge' not in row['kernel'] else ''}".strip()
        )
    lines = [
        "| kernel | inputs | dim | tile | " + " | ".join(targets) + " |",
        "|---|---|---|---|" + "---|" * len(targets),
    ]
    lines += [
        f"| {' | '.join(key)} | " + " | ".join(found.get(t, "") for t in targets) + " |" for key, found in cells.items()
    ]
    return "\n".join(lines) + "\n"


def updated(text: str) -> str:
    """``text`` with both tables redrawn."""
    for name, table in (("offline", offline_table), ("roofline", roofline_table)):
        block = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end {name} -->)", re.DOTALL)
        if not block.search(text):
            raise SystemExit(f"{PAGE} has no <!-- {name} --> block")
        text = block.sub(lambda match, table=table: match[1] + table() + match[2], text)
    return text


if __name__ == "__main__":
    before = PAGE.read_text()
    after = updated(before)
    if "--check" in sys.argv:
        sys.exit("docs/design/triton.md is older than its tables" if after != before else 0)
    PAGE.write_text(after)
