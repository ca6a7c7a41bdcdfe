"""Tables and charts, drawn from CSV rows and nothing else."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastxattn.bench.records import Record


def _by_case(records: Sequence[Record]) -> dict[tuple[str, str, str], list[Record]]:
    groups: dict[tuple[str, str, str], list[Record]] = {}
    for record in records:
        groups.setdefault((record.case, record.direction, record.dtype), []).append(record)
    return groups


def print_table(records: Sequence[Record], title: str) -> None:
    """A terminal table, one row per provider, the ratio to the rival in front."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title)
    for column in ("case", "pass", "dtype", "provider", "ms", "x rival", "GFLOP/s", "of peak", "check"):
        numeric = column in ("ms", "x rival", "GFLOP/s", "of peak")
        table.add_column(column, justify="right" if numeric else "left")
    for (case, direction, dtype), group in _by_case(records).items():
        for i, r in enumerate(sorted(group, key=lambda r: r.median_ms)):
            head = (case, direction, dtype) if i == 0 else ("", "", "")
            mark = " (rival)" if r.provider == r.rival else ""
            numbers = f"{r.median_ms:.3f}", f"{r.ratio:.2f}", f"{r.gflops:.0f}", of_peak(r)
            table.add_row(*head, r.provider + mark, *numbers, r.gate)
        table.add_section()
    # A log file has no width of its own; wrapped columns would be unreadable there.
    Console(width=None if Console().is_terminal else 150).print(table)


def of_peak(r: Record) -> str:
    """The share of the bound that a result reached, and which bound; empty where it was not measured."""
    return f"{r.roofline:.0%} {r.bound}".strip() if math.isfinite(r.roofline) else ""


def markdown_table(records: Sequence[Record], provider: str) -> str:
    """One markdown row per case: our provider's time, its ratio to the rival, and its share of the roofline."""
    peaks = any(math.isfinite(r.roofline) for r in records if r.provider == provider)
    lines = ["| case | pass | dtype | rival | rival ms | ms | speed-up |", "|---|---|---|---|---:|---:|---:|"]
    if peaks:
        lines = [lines[0] + " of peak |", lines[1] + "---:|"]
    for (case, direction, dtype), group in _by_case(records).items():
        ours = [r for r in group if r.provider == provider]
        theirs = [r for r in group if r.provider == r.rival]
        if ours and theirs:
            a, b = ours[0], theirs[0]
            ours_ms = f"{a.median_ms:.3g} | {a.ratio:.2f}x" if a.gate == "ok" else "- | outside its error budget"
            times = f"{b.provider} | {b.median_ms:.3g} | {ours_ms}"
            lines.append(f"| {case} | {direction} | {dtype} | {times} |" + f" {of_peak(a)} |" * peaks)
    return "\n".join(lines) + "\n"


def roofline_table(records: Sequence[Record]) -> str:
    """One markdown row per result of ours that has a bound: what it reached of what the machine does at most."""
    columns = ("operation", "case", "pass", "dtype", "of peak", "GFLOP/s, of peak", "GB/s, peak")
    lines = [f"| {' | '.join(columns)} |", "|---|---|---|---|---:|---:|---:|"]
    for r in records:
        if r.provider.startswith("fastxattn") and math.isfinite(r.roofline):
            peaks = f"{r.gflops:.0f} of {r.peak_gflops:.0f}" if r.gflops else "", f"{r.peak_gbytes:.0f}"
            lines.append(f"| {r.op} | {r.case} | {r.direction} | {r.dtype} | {of_peak(r)} | {' | '.join(peaks)} |")
    return "\n".join(lines) + "\n" if len(lines) > 2 else "Not measured yet: `make bench`.\n"


def plot_ratios(records: Sequence[Record], provider: str, path: Path, title: str) -> None:
    """A bar chart of ``provider``'s speed-up over each case's rival."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    ours = [r for r in records if r.provider == provider and math.isfinite(r.ratio)]
    dtypes = sorted({r.dtype for r in ours})
    names = list(dict.fromkeys(f"{r.case}, {r.direction}" for r in ours))
    figure, axes = plt.subplots(figsize=(9, 0.42 * len(names) + 1.4))
    height = 0.8 / max(1, len(dtypes))
    for i, dtype in enumerate(dtypes):
        values = {f"{r.case}, {r.direction}": r.ratio for r in ours if r.dtype == dtype}
        places = [names.index(name) + i * height for name in values]
        bars: Any = axes.barh(places, list(values.values()), height * 0.92, label=dtype)
        axes.bar_label(bars, fmt="%.1fx", padding=2, fontsize=8)
    axes.axvline(1.0, color="black", linewidth=1)
    axes.set_yticks([n + 0.4 - height / 2 for n in range(len(names))], names, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("times faster than the rival named in the CSV")
    axes.set_title(title, fontsize=10)
    axes.legend(fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)
