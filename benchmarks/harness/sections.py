"""Sections of the report. A CSV file is recognised by its columns, never by its name.

``speed`` has the schema of :class:`benchmarks.harness.Record`; ``memory`` has ``n`` and ``peak_bytes``; ``accuracy``
has ``keep``, ``strategy`` and ``mean``; ``errors`` has ``max_error`` and ``budget``. A file with other columns is shown
as a table.
"""

from __future__ import annotations

import csv
import functools
import html
import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.harness.report import short_device, titles

Row = dict[str, str]
ROWS_SHOWN = 60


@dataclass(frozen=True)
class Table:
    """One CSV."""

    name: str
    rows: tuple[Row, ...]

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the columns."""
        return tuple(self.rows[0]) if self.rows else ()

    def where(self) -> str:
        """Machine and versions that the rows name, once each."""
        seen = {" · ".join(r[c] for c in ("device", "versions", "git_sha") if r.get(c)): None for r in self.rows}
        return "; ".join(x for x in seen if x)


def read_tables(folder: Path) -> list[Table]:
    """Every CSV of a folder that has rows, by name."""
    found = []
    for path in sorted(folder.glob("*.csv")):
        with path.open(newline="") as file:
            rows = tuple(csv.DictReader(file))
        if rows:
            found.append(Table(path.stem, rows))
    return found


def kind(table: Table) -> str:
    """Which section a table belongs to."""
    columns = set(table.columns)
    if {"op", "case", "direction", "provider", "rival", "median_ms", "ratio", "gate"} <= columns:
        return "speed"
    if {"n", "peak_bytes", "provider"} <= columns:
        return "memory"
    if {"keep", "strategy", "mean"} <= columns:
        return "accuracy"
    if {"max_error", "budget", "op"} <= columns:
        return "errors"
    return "other"


def number(text: str | None) -> float:
    """The number in a cell; NaN where there is none."""
    try:
        return float(text or "nan")
    except ValueError:
        return math.nan


def as_html(columns: Sequence[str], rows: Sequence[Sequence[str]], limit: int = ROWS_SHOWN) -> str:
    """An HTML table; numbers to the right, long ones cut with a word about it."""
    head = "".join(f"<th>{html.escape(c)}</th>" for c in columns)
    body = ""
    for row in rows[:limit]:
        cells = ((c, ' class="n"' if math.isfinite(number(c.rstrip("x%"))) else "") for c in row)
        body += "<tr>" + "".join(f"<td{mark}>{html.escape(cell)}</td>" for cell, mark in cells) + "</tr>\n"
    rest = f"<p>{len(rows) - limit} more rows are in the file.</p>" if len(rows) > limit else ""
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table></div>{rest}'


def drawing(draw: Callable[[Any], None], width: float, height: float, words: str) -> str:
    """An SVG inside the page, drawn by ``draw(axes)``; ``words`` say what it shows."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(width, height))
    draw(axes)
    axes.spines[["top", "right"]].set_visible(False)
    text = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "fastxattn"}):
        figure.savefig(text, format="svg", bbox_inches="tight", metadata={"Date": None})
    plt.close(figure)
    svg = text.getvalue()
    return f'<figure role="img" aria-label="{html.escape(words)}">{svg[svg.index("<svg") :]}</figure>'


def shown_number(text: str, form: str = "{}") -> str:
    """A cell's number in a form, or a dash."""
    value = number(text)
    return form.format(value if form != "{}" else text) if math.isfinite(value) else "–"


def ours(provider: str) -> bool:
    """Whether a provider is this project."""
    return provider.startswith("fastxattn")


def speed(table: Table) -> str:
    """Bars of fastxattn's speed-up over each case's rival, and the table behind them."""
    rows = [r for r in table.rows if ours(r["provider"]) and r["provider"] != r["rival"]]
    shown = [r for r in rows if math.isfinite(number(r["ratio"]))]
    refused = len(rows) - len(shown)
    named = titles((r["op"], r["case"]) for r in rows)
    names = list(dict.fromkeys(_title(r, named) for r in shown))
    several = len({r.get("device") for r in rows}) > 1
    kinds = sorted({_series(r, several) for r in shown})

    def draw(axes: Any) -> None:
        height = 0.8 / max(1, len(kinds))
        for i, series in enumerate(kinds):
            values = {_title(r, named): number(r["ratio"]) for r in shown if _series(r, several) == series}
            bars = axes.barh([names.index(t) + i * height for t in values], list(values.values()), height * 0.9)
            bars.set_label(series)
            axes.bar_label(bars, fmt="%.2fx", padding=2, fontsize=7)
        axes.axvline(1.0, color="black", linewidth=1)
        axes.set_yticks([n + 0.4 - height / 2 for n in range(len(names))], names, fontsize=8)
        axes.invert_yaxis()
        axes.set_xlabel("times faster than the rival")
        axes.legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))

    tall = max(0.36, 0.18 * len(kinds)) * len(names) + 1.2
    chart = drawing(draw, 8, tall, f"{table.name}: speed-up over rivals") if shown else ""
    columns = ("case", "pass", "dtype", "machine", "threads", "provider", "rival", "ms", "speed-up", "GFLOP/s", "check")
    roofline = any(math.isfinite(number(r.get("roofline"))) for r in rows)
    cells = []
    for r in rows:
        machine = short_device(r.get("device") or "")
        line = [
            named[r["op"], r["case"]],
            r["direction"],
            r["dtype"],
            machine,
            r["threads"],
            r["provider"],
            r["rival"],
            shown_number(r["median_ms"]),
            shown_number(r["ratio"], "{:.2f}x"),
            shown_number(r["gflops"]),
            r["gate"],
        ]
        share = f"{shown_number(r.get('roofline') or '', '{:.0%}')} {r.get('bound') or ''}".strip()
        cells.append([*line, share] if roofline else line)
    note = f"<p>{refused} of {len(rows)} rows have no speed: outside their error budget.</p>" if refused else ""
    return chart + note + as_html([*columns, "of peak"] if roofline else columns, cells)


def _series(row: Row, several: bool) -> str:
    """What bars of one colour have in common: the dtype, and the machine where there are several."""
    return f"{row['dtype']}, {short_device(row.get('device') or '')}" if several else row["dtype"]


def _title(row: Row, named: Mapping[tuple[str, str], str]) -> str:
    name = f"{named[row['op'], row['case']]}, {row['direction']}"
    return name if row["provider"] in ("fastxattn", "fastxattn cpu") else f"{name} ({row['provider'][10:]})"


def memory(table: Table) -> str:
    """Peak extra memory against N, with the line that an N x N matrix of float32 would take."""
    series = dict.fromkeys((r.get("op", ""), r["provider"]) for r in table.rows)

    def points(op: str, provider: str) -> list[tuple[float, float]]:
        chosen = (r for r in table.rows if (r.get("op", ""), r["provider"]) == (op, provider))
        return sorted((number(r["n"]), max(number(r["peak_bytes"]), 1.0) / 2**20) for r in chosen)

    def draw(axes: Any) -> None:
        for op, provider in series:
            style = "-o" if ours(provider) else "--s"
            axes.plot(*zip(*points(op, provider), strict=True), style, ms=4, label=f"{op}: {provider}")
        sizes = sorted({number(r["n"]) for r in table.rows})
        axes.plot(sizes, [4 * n * n / 2**20 for n in sizes], ":", color="grey", label="N x N float32")
        axes.set(xscale="log", yscale="log", xlabel="N", ylabel="peak extra memory, MiB")
        axes.legend(fontsize=8, frameon=False)

    return drawing(draw, 6, 3.6, f"{table.name}: memory against N") + _all(table)


def accuracy(table: Table) -> str:
    """Accuracy against the share of tokens kept, a line per strategy, with confidence intervals."""
    parts = []
    for task in dict.fromkeys(r.get("task", "") for r in table.rows):
        rows = [r for r in table.rows if r.get("task", "") == task]
        draw = functools.partial(_retention, rows=rows, task=task)
        parts.append(drawing(draw, 6, 4, f"{task}: accuracy against kept tokens"))
    return "".join(parts) + _all(table)


def _retention(axes: Any, rows: Sequence[Row], task: str) -> None:
    for name in dict.fromkeys(r.get("strategy", "") for r in rows):
        points = sorted(
            (number(r["keep"]), number(r["mean"]), number(r.get("ci95") or "0"))
            for r in rows
            if r.get("strategy", "") == name
        )
        keep, value, spread = zip(*points, strict=True)
        if keep == (1.0,):
            axes.axhline(value[0], color="black", lw=1, ls="--", label=name)
        else:
            axes.errorbar(keep, value, spread, marker="o", ms=3, lw=1, capsize=2, label=name)
    measure = rows[0].get("measure") or "accuracy"
    axes.set(xscale="log", xlabel="share of tokens kept", ylabel=measure, title=task)
    kept = sorted({number(r["keep"]) for r in rows})
    axes.set_xticks(kept, [f"{share:.0%}" for share in kept])
    axes.minorticks_off()
    axes.legend(fontsize=7, ncols=2, frameon=False)


def errors(table: Table) -> str:
    """Largest error as a share of its budget, a dot per case, a line per operation, backend and dtype."""
    groups: dict[str, list[float]] = {}
    for r in table.rows:
        title = " ".join(r[c] for c in ("op", "backend", "dtype") if r.get(c))
        title += f" ({r['bound']} bound)" if r.get("bound") else ""
        groups.setdefault(title, []).append(number(r["max_error"]) / max(number(r["budget"]), 1e-300))

    def draw(axes: Any) -> None:
        for place, shares in enumerate(groups.values()):
            shown = [min(max(s, 1e-3), 1e2) for s in shares if not math.isnan(s)]
            axes.plot(shown, [place] * len(shown), "o", ms=4, alpha=0.5)
        axes.axvline(1.0, color="black", linewidth=1)
        axes.set_yticks(range(len(groups)), groups, fontsize=8)
        axes.invert_yaxis()
        axes.set(xscale="log", xlabel="largest error / budget (1: the limit)")

    outside = sum(s > 1 for shares in groups.values() for s in shares)
    note = f"<p>{outside} of {len(table.rows)} results are outside their budget.</p>"
    return drawing(draw, 8, 0.3 * len(groups) + 1, f"{table.name}: error against budget") + note + _all(table)


def other(table: Table) -> str:
    """The rows as they are."""
    return _all(table)


def _all(table: Table) -> str:
    columns = [c for c in table.columns if c not in ("device", "versions", "git_sha")]
    return as_html(columns, [[r.get(c) or "" for c in columns] for r in table.rows])


SECTIONS: dict[str, tuple[str, str, Callable[[Table], str]]] = {
    "speed": ("Speed against rivals", "bench", speed),
    "memory": ("Memory against N", "python -m benchmarks.bench_contrastive --memory", memory),
    "accuracy": ("Accuracy against kept tokens", "python -m benchmarks.pruning_retention", accuracy),
    "errors": ("Error against budget", "python -m benchmarks.errors", errors),
    "other": ("Other measurements", "", other),
}
