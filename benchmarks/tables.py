"""Rewrites the measured tables in README.md and docs/ from the CSVs: ``python -m benchmarks.tables [--check]``.

A table lives between ``<!-- table: NAME -->`` and ``<!-- end table -->``, where NAME is a file of benchmarks/results.
No number in a table is typed by hand.
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
        records = read_csv(RESULTS / f"{match[2]}.csv")
        first = records[0]
        measured = f"\nMeasured on {first.device}, {first.threads} threads; {first.versions}.\n"
        return match[1] + markdown_table(records, "fastxattn cpu") + measured + match[3]

    return BLOCK.sub(redraw, text)


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
