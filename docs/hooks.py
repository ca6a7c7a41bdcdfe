"""Fills the navigation: ``folder/*`` becomes the folder's pages that are not named elsewhere, sorted by title."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any


def title(page: Path) -> str:
    """The page's first heading, or its name."""
    found = re.search(r"^# (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return found[1] if found else page.stem


def expand(entry: Any, docs: Path) -> list[Any]:
    """One entry of the navigation, its wildcards replaced by pages."""
    if isinstance(entry, dict):
        ((name, inside),) = entry.items()
        return [{name: inside if isinstance(inside, str) else [e for i in inside for e in expand(i, docs)]}]
    if isinstance(entry, str) and entry.endswith("/*"):
        pages = sorted((docs / entry[:-2]).glob("*.md"), key=lambda page: (page.stem != "index", title(page)))
        return [page.relative_to(docs).as_posix() for page in pages]
    return [entry]


def on_config(config: Any) -> Any:
    """Called by mkdocs before it reads the navigation."""
    config.nav = [e for entry in config.nav for e in expand(entry, Path(config.docs_dir))]
    return config
