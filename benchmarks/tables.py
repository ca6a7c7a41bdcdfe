"""Rewrites the tables in README.md and docs/: ``python -m benchmarks.tables [--check]``.

A table lives between ``<!-- table: NAME -->`` and ``<!-- end table -->``, where NAME is a file of benchmarks/results,
``highlights`` for a few rows of every file (drawn as a chart, too), ``roofline`` for what every CPU kernel reaches of
what the machine does at most, ``gpu`` for every provider's time there, ``backends`` for what runs where, which is
asked of the code, or ``transforms`` for what the composition table of the tests holds every operation to. No number in
a table is typed by hand.
"""

from __future__ import annotations

import math
import re
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from benchmarks.common import IMAGES, RESULTS
from fastxattn.bench import Record, read_csv, sections
from fastxattn.bench.report import markdown_table, plot_ratios, roofline_table, short_device

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end table -->)", re.DOTALL)


def updated(text: str) -> str:
    """``text`` with every table block redrawn."""

    def redraw(match: re.Match[str]) -> str:
        if match[2] == "backends":
            return match[1] + (backends() or match[0].removeprefix(match[1]).removesuffix(match[3])) + match[3]
        if match[2] == "roofline":
            return match[1] + roofline() + match[3]
        if match[2] == "transforms":
            return match[1] + transforms() + match[3]
        if match[2] == "highlights":
            return match[1] + highlights() + match[3]
        if match[2] == "gpu":
            return match[1] + gpu() + match[3]
        records = read_csv(RESULTS / f"{match[2]}.csv")
        places = dict.fromkeys(f"{r.device}, {r.threads} threads; {r.versions}" for r in records)
        measured = f"\nMeasured on {'. And on '.join(places)}.\n"
        return match[1] + markdown_table(records, "fastxattn cpu") + measured + match[3]

    return BLOCK.sub(redraw, text)


HIGHLIGHTS = {
    "models": ("BLIP-2 Q-Former.* forward ", "BLIP ITM.* forward ", "CLIP text tower.*captions", "LXMERT base"),
    "attention": ("attention (text to image|image to text), 16 ragged ", "dense 8x32x257 ", "dense 8x77x577 "),
    "importance": ("text to image",), "bidirectional": (r"2 x \(1024 patches.* forward ",),
    "pruning": ("select .* gather.*50 %", "encoder .*keep 50%"), "contrastive": ("infonce N=8192", "sigmoid N=8192"),
    "late_interaction": ("256 x 256",), "retrieval": ("1000000 x 256",), "export": ("node, text to image",),
}  # fmt: skip
"""By file, what a float32 row's ``op title`` contains: what each room is for, where it wins little or nothing too."""


def highlighted() -> Iterator[tuple[Record, Record]]:
    """Our row and its rival's, where several machines measured one the last."""
    for name, patterns in HIGHLIGHTS.items():
        records = [r for r in read_csv(RESULTS / f"{name}.csv") if r.dtype == "float32"]
        best = {}
        for r in records:
            title = f"{r.op} {r.case} {r.direction} "
            if r.provider.startswith("fastxattn") and r.gate == "ok" and any(re.search(p, title) for p in patterns):
                rival = [t for t in records if (t.case, t.direction, t.device, t.threads, t.provider) == (
                    r.case, r.direction, r.device, r.threads, r.rival)]  # fmt: skip
                best[title] = (r, rival[-1])
        yield from best.values()


def highlights() -> str:
    """A row for each thing that a newcomer may want, and where it was measured."""
    columns = ("what", "pass", "rival", "rival ms", "ms", "speed-up", "machine")
    lines = [f"| {' | '.join(columns)} |", "|---|---|---|---:|---:|---:|---|"]
    for ours, rival in highlighted():
        machine = f"{short_device(ours.device)}, {ours.threads} thread{'s' * (ours.threads > 1)}"
        lines.append(
            f"| {_what(ours)} | {ours.direction} | {ours.rival} | {rival.median_ms:.3g} | {ours.median_ms:.3g} "
            f"| {ours.ratio:.2f}x | {machine} |"
        )
    return "\n".join(lines) + "\n"


def _what(r: Record) -> str:
    return f"{r.op}: {r.case}"


def draw() -> None:
    """Every chart of ratios that the documents show, and the highlights' own."""
    for path in sorted(RESULTS.glob("*.csv")):
        image = IMAGES / f"{path.stem}.png"
        if image.exists() and path.read_text().startswith("op,case,direction,provider,rival,"):
            records = fastest(read_csv(path)) if path.stem == "gpu" else read_csv(path)
            ours = Counter(r.provider for r in records if r.provider.startswith("fastxattn")).most_common(1)[0][0]
            devices = ", ".join(dict.fromkeys(r.device for r in records))
            plot_ratios(records, ours, image, f"{path.stem}: {devices}")
    rows = [replace(ours, case=_what(ours), provider="fastxattn", device="") for ours, _ in highlighted()]
    plot_ratios(rows, "fastxattn", IMAGES / "highlights.png", "float32 on a CPU, against the rival in the table")


def roofline() -> str:
    """Shares of the roofline from every file of results, and where they were measured."""
    names = [table.name for table in sections.read_tables(RESULTS) if sections.kind(table) == "speed"]
    records = [r for name in names for r in read_csv(RESULTS / f"{name}.csv") if r.threads]  # a GPU's have none
    places = dict.fromkeys(f"{r.device}, {r.threads} threads" for r in records if math.isfinite(r.roofline))
    return roofline_table(records) + (f"\nMeasured on {'; '.join(places)}.\n" if places else "")


def fastest(records: list[Record]) -> list[Record]:
    """Of each case the faster one of our backends, as ``fastxattn``."""
    best: dict[tuple[str, str, str, str], Record] = {}
    for r in records:
        key = r.op, r.case, r.direction, r.dtype
        if r.provider.startswith("fastxattn") and (key not in best or r.median_ms < best[key].median_ms):
            best[key] = replace(r, provider="fastxattn")
    return list(best.values())


def gpu() -> str:
    """A row for each case of gpu.csv: our backends' times, and each rival's with how many times longer it took."""
    records = read_csv(RESULTS / "gpu.csv")
    cases: dict[tuple[str, str, str, str], list[Record]] = {}
    for r in records:
        cases.setdefault((r.op, r.case, r.direction, r.dtype), []).append(r)
    lines = [
        "| what | pass | dtype | ours, ms | others, ms (our fastest is so many times as fast) |",
        "|---|---|---|---|---|",
    ]
    for (op, case, direction, dtype), rows in cases.items():
        ours = [r for r in rows if r.provider.startswith("fastxattn")]
        best = min(r.median_ms for r in ours)
        own = ", ".join(f"{r.provider.removeprefix('fastxattn ')} {r.median_ms:.3g}" for r in ours)
        others = ", ".join(f"{r.provider} {r.median_ms:.3g} ({r.median_ms / best:.2f}x)" for r in rows if r not in ours)
        lines.append(f"| {op}: {case} | {direction} | {dtype} | {own} | {others} |")
    places = dict.fromkeys(f"{r.device}; {r.versions}" for r in records)
    return "\n".join(lines) + f"\n\nMeasured on {'. And on '.join(places)}.\n"


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


def transforms() -> str:
    """What is right and what is refused under PyTorch's transforms, as the tests check it."""
    from tests.compositions import table

    return table.markdown()


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
    draw()
