"""Rewrites the tables in README.md and docs/: ``python -m benchmarks.tables [--check]``.

A table lives between ``<!-- table: NAME -->`` and ``<!-- end table -->``, where NAME is a file of benchmarks/results,
or ``backends`` for what runs where, which is asked of the code. No number in a table is typed by hand.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from benchmarks.common import RESULTS
from fastxattn.bench import read_csv
from fastxattn.bench.report import markdown_table

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end table -->)", re.DOTALL)


def updated(text: str) -> str:
    """``text`` with every table block redrawn."""

    def redraw(match: re.Match[str]) -> str:
        if match[2] == "backends":
            return match[1] + (backends() or match[0].removeprefix(match[1]).removesuffix(match[3])) + match[3]
        records = read_csv(RESULTS / f"{match[2]}.csv")
        places = dict.fromkeys(f"{r.device}, {r.threads} threads; {r.versions}" for r in records)
        measured = f"\nMeasured on {'. And on '.join(places)}.\n"
        return match[1] + markdown_table(records, "fastxattn cpu") + measured + match[3]

    return BLOCK.sub(redraw, text)


OPERATIONS = {
    "attention": ("cross-attention, forward and backward", "node with portable body"),
    "importance": ("key importance", "node with portable body"),
    "bidirectional": ("bidirectional attention", "through attention"),
    "context_attention": ("context attention (projections absorbed)", "node with portable body"),
    "select": ("pruning: select, gather, merge, match, greedy, quantile", "select; others as standard operators"),
    "infonce": ("InfoNCE loss", "standard operators"),
    "sigmoid": ("sigmoid loss", "standard operators"),
    "maxsim": ("late interaction", "standard operators"),
    "topk": ("top-k similarity", "standard operators"),
}


def backends() -> str:
    """What runs where, as each operation's own table of backends says; empty without the CPU kernels to ask."""
    from fastxattn.cli.problems import DTYPES, Shape, problem
    from fastxattn.runtime import native
    from fastxattn.runtime.backend import explain_call

    if native.cpu_library().library is None:
        return ""
    lines = ["| operation | reference (PyTorch) | C++ CPU | Triton | CUDA C++ | ONNX |", "|---|---|---|---|---|---|"]
    for op, (title, onnx) in OPERATIONS.items():
        asked = {}
        for dtype in DTYPES:
            call, arguments, options = problem(op, Shape((3,), (4,), 2, 2, 8, dtype, "cpu", False))
            asked[dtype] = {v.backend: v.reason for v in explain_call(call, *arguments, **options).verdicts}
        names = asked["float32"]
        on_cpu = ", ".join(d for d, verdicts in asked.items() if "cpu" in verdicts and verdicts["cpu"] is None)
        if op == "select":
            on_cpu = "float32 scores, any rows"
        cells = ["any dtype", on_cpu or "no", *("yes" if b in names else "no" for b in ("triton", "cuda")), onnx]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def stale(root: Path = ROOT) -> list[Path]:
    """Files whose tables differ from the CSVs."""
    files = [root / "README.md", *sorted((root / "docs").rglob("*.md"))]
    return [f for f in files if updated(f.read_text()) != f.read_text()]


if __name__ == "__main__":
    files = stale()
    if "--check" in sys.argv:
        sys.exit(f"tables are older than their CSVs: {', '.join(map(str, files))}" if files else 0)
    for file in files:
        file.write_text(updated(file.read_text()))
        print(f"updated {file.relative_to(ROOT)}")
