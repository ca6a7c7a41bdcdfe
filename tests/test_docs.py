"""What the documents say is what the CSVs hold, and their links lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from benchmarks import tables

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def test_tables_are_drawn_from_the_csvs() -> None:
    assert tables.stale() == []


def test_a_stale_table_is_noticed() -> None:
    text = "<!-- table: attention -->\n| wrong |\n<!-- end table -->"
    assert "| wrong |" not in tables.updated(text)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_relative_links_exist(page: Path) -> None:
    targets = re.findall(r"\]\((?!https?:|#|mailto:)([^)#]+)", page.read_text())
    assert [t for t in targets if not (page.parent / t).exists()] == []
