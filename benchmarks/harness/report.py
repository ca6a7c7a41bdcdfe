"""Tables and charts, drawn from CSV rows and nothing else."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness.records import Record


def _by_case(records: Sequence[Record]) -> dict[tuple[str, str, str], list[Record]]:
    """The rows of each case, by what :func:`titles` calls it."""
    groups: dict[tuple[str, str, str], list[Record]] = {}
    named = titles((r.op, r.case) for r in records)
    for r in records:
        groups.setdefault((named[r.op, r.case], r.direction, r.dtype), []).append(r)
    return groups


def titles(cases: Iterable[tuple[str, str]]) -> dict[tuple[str, str], str]:
    """What to call each (operation, case): the case, and the operation too where several have a case of that name."""
    found = dict.fromkeys(cases)
    names = [case for _, case in found]
    return {(op, case): f"{op}, {case}" if names.count(case) > 1 else case for op, case in found}


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
    """One markdown row per case: for each device the rival's time, ``provider``'s and the ratio."""
    devices = list(dict.fromkeys(r.device for r in records))
    columns = ["rival ms", "ms", "speed-up"]
    if len(devices) > 1:
        columns = [f"{column} [{short_device(d)}]" for d in devices for column in columns]
    lines = [f"| case | pass | dtype | rival | {' | '.join(columns)} |", "|---|---|---|---|" + "---:|" * len(columns)]
    for (case, direction, dtype), group in _by_case(records).items():
        cells = []
        for device in devices:
            ours = [r for r in group if r.provider == provider and r.device == device]
            theirs = [r for r in group if r.provider == r.rival and r.device == device]
            if not (ours and theirs):
                cells += ["", "", ""]
                continue
            a, b = ours[0], theirs[0]
            cells += [f"{b.median_ms:.3g}"]
            cells += [f"{a.median_ms:.3g}", f"{a.ratio:.2f}x"] if a.gate == "ok" else ["-", "outside its error budget"]
        if any(cells):
            lines.append(f"| {case} | {direction} | {dtype} | {group[0].rival} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def short_device(device: str) -> str:
    """The instruction set that a CPU's name ends with, or the name."""
    return device.rpartition("[")[2].replace("]", "")


def roofline_table(records: Sequence[Record]) -> str:
    """One markdown row per fastxattn result that has a bound: the share of the machine's peak it reached."""
    columns = ("operation", "case", "pass", "dtype", "machine", "of peak", "GFLOP/s, of peak", "GB/s, peak")
    lines = [f"| {' | '.join(columns)} |", "|---|---|---|---|---|---:|---:|---:|"]
    for r in records:
        if r.provider.startswith("fastxattn") and math.isfinite(r.roofline):
            peaks = (f" of {p:.0f}" if math.isfinite(p) else "" for p in (r.peak_gflops, r.peak_gbytes))
            compute, memory = peaks
            cells = of_peak(r), f"{r.gflops:.0f}{compute}" if r.gflops else "", memory.removeprefix(" of ")
            names = r.op, r.case, r.direction, r.dtype, f"{short_device(r.device)} x {r.threads}"
            lines.append(f"| {' | '.join((*names, *cells))} |")
    return "\n".join(lines) + "\n" if len(lines) > 2 else "Not measured yet: `make bench`.\n"


def plot_ratios(records: Sequence[Record], provider: str, path: Path, title: str) -> None:
    """A bar chart of ``provider``'s speed-up over each case's rival."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    ours = _by_case([r for r in records if r.provider == provider and math.isfinite(r.ratio)])
    series = sorted({(r.dtype, r.device) for group in ours.values() for r in group})
    several = len({device for _, device in series}) > 1
    names = list(dict.fromkeys((case, direction) for case, direction, _ in ours))
    figure, axes = plt.subplots(figsize=(9, max(0.42, 0.19 * len(series)) * len(names) + 1.4))
    height = 0.8 / max(1, len(series))
    for i, (dtype, device) in enumerate(series):
        values = {
            (case, direction): r.ratio
            for (case, direction, of), group in ours.items()
            for r in group
            if (of, r.device) == (dtype, device)
        }
        label = f"{dtype}, {short_device(device)}" if several else dtype
        places = [names.index(name) + i * height for name in values]
        bars: Any = axes.barh(places, list(values.values()), height * 0.92, label=label)
        axes.bar_label(bars, fmt="%.2fx", padding=2, fontsize=8)
    axes.axvline(1.0, color="black", linewidth=1)
    axes.set_yticks([n + 0.4 - height / 2 for n in range(len(names))], map(", ".join, names), fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.1)
    axes.set_xlabel("times faster than the rival named in the CSV")
    axes.set_title(title, fontsize=10)
    axes.legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)
