"""HTML for notebooks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape


class Markup(str):
    """Text that is HTML already."""

    __slots__ = ()


def table(caption: str, head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table of escaped cells; cells of :class:`Markup` are taken as they are."""
    lines = [_row("th", head), *(_row("td", row) for row in rows)]
    return f'<table><caption style="text-align:left">{escape(caption)}</caption>{"".join(lines)}</table>'


def _row(tag: str, cells: Sequence[object]) -> str:
    texts = (cell if isinstance(cell, Markup) else escape(str(cell)) for cell in cells)
    return "<tr>" + "".join(f'<{tag} style="text-align:left">{text}</{tag}>' for text in texts) + "</tr>"


def strip(colors: Sequence[str], width: int = 400, height: int = 12) -> Markup:
    """A row of cells, one color each, as an inline SVG image."""
    parts = []
    start = 0
    for end in range(1, len(colors) + 1):
        if end == len(colors) or colors[end] != colors[start]:
            parts.append(f'<rect x="{start}" width="{end - start}" height="1" fill="{escape(colors[start])}"/>')
            start = end
    size = f'width="{width}" height="{height}" viewBox="0 0 {max(len(colors), 1)} 1" preserveAspectRatio="none"'
    return Markup(f'<svg xmlns="http://www.w3.org/2000/svg" {size}>{"".join(parts)}</svg>')
