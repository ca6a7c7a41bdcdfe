"""One self-contained HTML page of a folder of result CSVs: ``fastxattn report``."""

from __future__ import annotations

import html
from dataclasses import dataclass
from pathlib import Path

from benchmarks.harness.records import git_sha, versions
from benchmarks.harness.sections import SECTIONS, Table, kind, read_tables
from fastxattn.runtime.timing import device_name

STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8881; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1250px; margin: 0 auto; padding: 1.5rem; }
h1 { margin-bottom: 0; } h2 { border-bottom: 1px solid var(--line); margin-top: 2.5rem; } .where { color: #888; }
nav a { margin-right: 1rem; } .scroll { overflow: auto; max-height: 26rem; border: 1px solid var(--line); }
table { border-collapse: collapse; font-size: 13px; width: 100%; } th { position: sticky; top: 0; background: Canvas; }
th, td { padding: .2rem .6rem; border-bottom: 1px solid var(--line); text-align: left; white-space: nowrap; }
td.n { text-align: right; font-variant-numeric: tabular-nums; } tbody tr:nth-child(even) { background: var(--soft); }
figure { margin: 1rem 0; background: white; padding: .5rem; border-radius: 6px; } svg { max-width: 100%; height: auto; }
"""


@dataclass(frozen=True)
class Page:
    """What :func:`write_page` wrote."""

    path: Path
    tables: int
    missing: tuple[str, ...]
    """Sections for which there is no CSV yet."""

    def __str__(self) -> str:
        without = f"; nothing yet for: {', '.join(self.missing)}" if self.missing else ""
        return f"{self.path}: {self.tables} result files{without}"


def write_page(results: Path, out: Path) -> Page:
    """Draw every CSV of ``results`` into one page at ``out``; sections without a CSV say how to get one.

    Raises:
        FileNotFoundError: ``results`` is not a folder.
        ImportError: matplotlib is missing (``pip install 'fastxattn[demo]'``).
    """
    if not results.is_dir():
        raise FileNotFoundError(f"results must be a folder of CSVs; there is none at {results}")
    tables = read_tables(results)
    by_kind: dict[str, list[Table]] = {name: [t for t in tables if kind(t) == name] for name in SECTIONS}
    body, links = "", ""
    for name, (title, command, draw) in SECTIONS.items():
        if name == "other" and not by_kind[name]:
            continue
        links += f'<a href="#{name}">{title}</a>'
        body += f'<h2 id="{name}">{title}</h2>\n'
        for table in by_kind[name]:
            body += f'<h3 id="{table.name}">{html.escape(table.name.replace("_", " "))}</h3>\n{draw(table)}\n'
            if where := table.where():
                body += f'<p class="where">Measured on {html.escape(where)}</p>\n'
        if not by_kind[name]:
            how = f"make {command}" if command == "bench" else command
            body += f"<p>Not measured yet: <code>{how}</code></p>\n"
    page = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>fastxattn: results</title><style>{STYLE}</style></head>\n<body><h1>fastxattn: results</h1>\n"
        f'<p class="where">Drawn with {html.escape(versions())}, commit {html.escape(git_sha() or "unknown")}, on '
        f"{html.escape(device_name())}. Each result names the machine it was measured on.</p>\n<nav>{links}</nav>\n"
        f"{body}</body></html>\n"
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(page, encoding="utf-8")
    missing = tuple(title for name, (title, _, _) in SECTIONS.items() if name != "other" and not by_kind[name])
    return Page(out, len(tables), missing)
