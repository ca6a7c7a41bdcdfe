"""Fills the navigation: ``folder/*`` becomes the folder's pages that are not named elsewhere, sorted by title."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any


def title(page: Path) -> str:
    """The page's first heading, or its name."""
    found = re.search(r"^# (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return found[1] if found else page.stem


def named(entry: Any) -> set[str]:
    """Pages and wildcards that an entry of the navigation names."""
    if isinstance(entry, dict):
        return {name for inside in entry.values() for name in named(inside)}
    return {name for inside in entry for name in named(inside)} if isinstance(entry, list) else {entry}


def expand(entry: Any, docs: Path, others: set[str]) -> list[Any]:
    """Replace the wildcards of one entry by the pages that are not among ``others``."""
    if isinstance(entry, dict):
        ((name, inside),) = entry.items()
        return [{name: inside if isinstance(inside, str) else [e for i in inside for e in expand(i, docs, others)]}]
    if isinstance(entry, str) and entry.endswith("/*"):
        pages = sorted((docs / entry[:-2]).glob("*.md"), key=lambda page: (page.stem != "index", title(page)))
        return [name for page in pages if (name := page.relative_to(docs).as_posix()) not in others]
    return [entry]


def on_config(config: Any) -> Any:
    """Expand the navigation; mkdocs calls this before it reads it."""
    others = named(config.nav)
    config.nav = [e for entry in config.nav for e in expand(entry, Path(config.docs_dir), others)]
    return config
