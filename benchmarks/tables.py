"""Rewrites the tables in README.md and docs/: ``python -m benchmarks.tables [--check]``.

A table lives between ``<!-- table: NAME -->`` and ``<!-- end table -->``. NAME is a file of benchmarks/results or
``headline`` (three results), ``highlights`` (README's rows, drawn as a chart too), ``speed`` (every speed-up on CPUs),
``below`` (those below 1x), ``roofline`` (the share of its bound that each CPU kernel reaches), ``gpu`` (each provider's
time on the GPU), ``gpu_ranges`` (their speed-ups in short), ``transforms`` (what the tests check under each), or
``backends`` (which backend runs what, read from the code). No number in a table is typed by hand.
"""

from __future__ import annotations

import math
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path

from benchmarks.common import IMAGES, RESULTS
from benchmarks.harness import Record, read_csv, sections
from benchmarks.harness.report import markdown_table, plot_ratios, roofline_table

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end table -->)", re.DOTALL)


def updated(text: str) -> str:
    """``text`` with every table block redrawn."""

    def redraw(match: re.Match[str]) -> str:
        if match[2] == "backends":
            return match[1] + (backends() or match[0].removeprefix(match[1]).removesuffix(match[3])) + match[3]
        if match[2] in DRAWN:
            return match[1] + DRAWN[match[2]]() + match[3]
        records = read_csv(RESULTS / f"{match[2]}.csv")
        places = dict.fromkeys(f"{r.device}, {r.threads} threads; {r.versions}" for r in records)
        where = f"\nMeasured on {'. And on '.join(places)}.\n"
        return match[1] + markdown_table(records, "fastxattn cpu") + where + match[3]

    return BLOCK.sub(redraw, text)


HIGHLIGHTS = (
    ("models", "CLIP text tower.*captions"),
    ("models", "Whisper.*module, cached"),
    ("attention", "attention text to image, 16 ragged forward "),
    ("attention", "dense 8x32x257"),
    ("co_attention", "LXMERT.* forward "),
    ("pruning", "gather.*50 %"),
    ("contrastive", "infonce N=(256|8192)"),
    ("export", "node, text to image"),
)
"""File and what ``op case direction`` contains, of README's rows: each operation's main use, losses included."""
HEADLINES = (
    (
        "models",
        "CLIP text tower.*captions",
        "float32",
        "CLIP text tower after `accelerate`, batch 16, captions of up to 77 tokens, forward",
    ),
    (
        "attention",
        "attention text to image, 16 ragged forward ",
        "bfloat16",
        "packed text-to-image attention, 16 samples of unequal length, forward",
    ),
    (
        "contrastive",
        "infonce N=8192",
        "float32",
        "InfoNCE of 8192 pairs of width 512, forward and backward, without the N x N logits",
    ),
)
"""The first numbers of README: file, what the row contains, its dtype, and how to describe it."""
COLUMNS = tuple((isa, dtype) for isa in ("avx512bf16", "avx2") for dtype in ("float32", "bfloat16"))
ISAS = {"avx512bf16": "AVX-512-BF16", "avx2": "AVX2"}
RIVALS = {"sdpa": "PyTorch's SDPA", "sdpa loop": "PyTorch's SDPA in a loop over the samples"}
NAMES = {"co_attention": "co-attention", "absorbed_attention": "absorbed attention", "select_gather": "pruning"}
"""What a table calls an operation of the CSVs, where that is not its name there."""
SPEEDS = (
    "models",
    "attention",
    "importance",
    "co_attention",
    "absorbed_attention",
    "pruning",
    "contrastive",
    "late_interaction",
    "retrieval",
    "export",
)
"""Files of speed-ups on CPUs."""

Measured = dict[tuple[str, str], Record]  # of one case: by instruction set and dtype


def measured(name: str) -> dict[tuple[str, str, str, str], Measured]:
    """Results of one file by (op, case, direction, rival), side by side.

    Of several results for one machine and dtype the one with the most threads counts. A pruned model differs from its
    rival by design and is not compared here.
    """
    found: dict[tuple[str, str, str, str], Measured] = {}
    records = [r for r in read_csv(RESULTS / f"{name}.csv") if r.provider.startswith("fastxattn")]
    several = {r.case for r in records if r.provider == "fastxattn packed only"}
    for r in sorted(records, key=lambda r: r.threads):
        if r.gate.startswith("prunes"):
            continue
        case = f"{r.case}, {'packed only' if r.provider != 'fastxattn' else 'auto'}" if r.case in several else r.case
        isa = r.device.partition("[")[2].partition("]")[0]
        found.setdefault((r.op, case, r.direction, r.rival), {})[isa, r.dtype] = r
    order = {r.case: place for place, r in enumerate(reversed(records))}  # cases in the file's order
    return dict(sorted(found.items(), key=lambda item: -max(order[r.case] for r in item[1].values())))


def side_by_side(rows: Iterable[tuple[tuple[str, str, str, str], Measured]]) -> str:
    """One markdown row per case, a column per machine and dtype: the speed-up and the time it took."""
    titles = [f"{ISAS[isa]}, {dtype}" for isa, dtype in COLUMNS]
    lines = [f"| case | pass | rival | {' | '.join(titles)} |", "|---|---|---|---:|---:|---:|---:|"]
    for (op, case, direction, rival), results in rows:
        cells = " | ".join(_cell(results.get(column)) for column in COLUMNS)
        lines.append(f"| {NAMES.get(op, op)}: {case} | {direction} | {rival} | {cells} |")
    return "\n".join(lines) + "\n"


def _cell(r: Record | None) -> str:
    if r is None:
        return "-"
    if r.gate != "ok":
        return "outside its error budget"
    return f"{r.ratio:.3g}x, {_time(r.median_ms)}" + (", 1 thread" if r.threads == 1 else "")


def _time(ms: float) -> str:
    return f"{ms / 1000:.3g} s" if ms >= 999.5 else f"{ms:.3g} ms" if ms >= 0.1 else f"{1000 * ms:.3g} us"


def highlighted() -> Iterator[tuple[tuple[str, str, str, str], Measured]]:
    """README's rows."""
    for name, pattern in HIGHLIGHTS:
        for key, results in measured(name).items():
            if re.search(pattern, " ".join((*key[:3], ""))):
                yield key, results


def below() -> list[tuple[tuple[str, str, str, str], Measured]]:
    """Of every file the cases where some result is slower than its rival; only those results."""
    cases = [item for name in SPEEDS for item in measured(name).items()]
    slower = [(key, {c: r for c, r in results.items() if r.gate != "ok" or r.ratio < 1}) for key, results in cases]
    return [(key, results) for key, results in slower if results]


def highlights() -> str:
    """README's table, and how many results of the full one are below 1x."""
    total = sum(len(results) for name in SPEEDS for results in measured(name).values())
    slower = sum(len(results) for _, results in below())
    return side_by_side(highlighted()) + (
        f"\n{slower} of {total} results on these CPUs are below 1x or exceed their error budget: "
        "[the list](docs/guide/performance.md#below-1x).\n"
    )


def headline() -> str:
    """Three results on the machine of the first column, a line each."""
    lines = []
    for name, pattern, dtype, words in HEADLINES:
        key, results = next(i for i in measured(name).items() if re.search(pattern, " ".join((*i[0][:3], ""))))
        r = results[COLUMNS[0][0], dtype]
        lines.append(f"- **{r.ratio:.1f}x** the speed of {RIVALS.get(key[3], key[3])}: {words}, {dtype}")
    return "\n".join(lines) + "\n"


def speed() -> str:
    """Every result of every file of speed-ups on CPUs."""
    return side_by_side(item for name in SPEEDS for item in measured(name).items())


def draw() -> None:
    """Every chart of ratios that the documents show, and the highlights' own."""
    for path in sorted(RESULTS.glob("*.csv")):
        image = IMAGES / f"{path.stem}.png"
        if image.exists() and path.read_text().startswith("op,case,direction,provider,rival,"):
            records = fastest(read_csv(path)) if path.stem == "gpu" else read_csv(path)
            ours = Counter(r.provider for r in records if r.provider.startswith("fastxattn")).most_common(1)[0][0]
            devices = ", ".join(dict.fromkeys(r.device for r in records))
            plot_ratios(records, ours, image, f"{path.stem}: {devices}")
    isa = COLUMNS[0][0]  # one machine, to fit a screen
    rows = [
        replace(r, case=f"{NAMES.get(key[0], key[0])}: {key[1]}", provider="fastxattn", device="", op="")
        for key, results in highlighted()
        for (of, _), r in results.items()
        if of == isa
    ]
    plot_ratios(rows, "fastxattn", IMAGES / "highlights.png", f"AMD EPYC, {ISAS[isa]}, 2 threads: rivals in the table")


def roofline() -> str:
    """Shares of the roofline from every file of results, and where they were measured."""
    names = [table.name for table in sections.read_tables(RESULTS) if sections.kind(table) == "speed"]
    records = [r for name in names for r in read_csv(RESULTS / f"{name}.csv") if r.threads]  # a GPU's have none
    places = dict.fromkeys(f"{r.device}, {r.threads} threads" for r in records if math.isfinite(r.roofline))
    return roofline_table(records) + (f"\nMeasured on {'; '.join(places)}.\n" if places else "")


def fastest(records: list[Record]) -> list[Record]:
    """The faster backend of each case, as ``fastxattn``."""
    best: dict[tuple[str, str, str, str], Record] = {}
    for r in records:
        key = r.op, r.case, r.direction, r.dtype
        if r.provider.startswith("fastxattn") and (key not in best or r.median_ms < best[key].median_ms):
            best[key] = replace(r, provider="fastxattn")
    return list(best.values())


def gpu() -> str:
    """A row for each case of gpu.csv: the backends' times, and each rival's with how many times longer it took."""
    records = read_csv(RESULTS / "gpu.csv")
    cases: dict[tuple[str, str, str, str], list[Record]] = {}
    for r in records:
        cases.setdefault((r.op, r.case, r.direction, r.dtype), []).append(r)
    lines = [
        "| case | pass | dtype | fastxattn, ms | rivals, ms (speed-up of the fastest fastxattn backend) |",
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


def gpu_ranges() -> str:
    """Lowest and highest speed-up of the fastest backend over each rival of gpu.csv, by operation, dtype and pass."""
    records = read_csv(RESULTS / "gpu.csv")
    best = {(r.op, r.case, r.direction, r.dtype): r.median_ms for r in fastest(records)}
    found: dict[tuple[str, str, str], dict[str, list[float]]] = {}
    for r in records:
        if not r.provider.startswith("fastxattn"):
            passes = found.setdefault((NAMES.get(r.op, r.op), r.dtype, r.provider), {})
            passes.setdefault(r.direction, []).append(r.median_ms / best[r.op, r.case, r.direction, r.dtype])
    lines = ["| operation | dtype | rival | forward | forward+backward |", "|---|---|---|---:|---:|"]
    for key, passes in found.items():
        cells = [sorted(passes.get(direction, [])) for direction in ("forward", "forward+backward")]
        shown = (f"{c[0]:.2f}x to {c[-1]:.2f}x" if len(c) > 1 else f"{c[0]:.2f}x" if c else "-" for c in cells)
        lines.append(f"| {' | '.join((*key, *shown))} |")
    return "\n".join(lines) + "\n"


DRAWN: dict[str, Callable[[], str]] = {
    "roofline": roofline,
    "highlights": highlights,
    "headline": headline,
    "gpu": gpu,
    "gpu_ranges": gpu_ranges,
    "speed": speed,
    "below": lambda: side_by_side(below()),
    "transforms": lambda: transforms(),
}
"""Tables that are not one file's."""

OPERATIONS = {
    "attention": ("cross-attention, forward and backward", "node with portable body"),
    "importance": ("key importance", "node with portable body"),
    "co_attention": ("co-attention", "through attention"),
    "absorbed_attention": ("absorbed attention (projections absorbed)", "node with portable body"),
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
