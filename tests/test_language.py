"""The documents use the words of the field, source files in their comments and strings too."""

from __future__ import annotations

import io
import re
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [p for p in (*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")) if p.name != "CODE_OF_CONDUCT.md"]
WORDS = {
    r"rooms?|houses?|halls?": "operation, package, module, memory",
    r"(?:short|checked) way": "fast path, validated path",
    r"in vain": "negative result",
    r"wanted": "target",
    r"gave": "measured, result, returned",
    r"mend(?:s|ed)?": "fixed",
    r"said once": "deduplicated",
    r"taken again": "re-measured",
    r"what (?:is|was) told|what says": "describes, reports",
    r"(?:find|found|finds) the words": "raises",
    r"answers? for": "supports",
    r"(?:that|which) (?:is|are|was|were) (?:not )?there|token is there": "padding, valid tokens",
    r"(?:tokens|rows|keys|ones) that exist|present tokens": "valid tokens",
    r"puts? away": "stored",
    r"hand(?:s|ed)? on": "passed through",
    r"left alone": "unchanged",
    r"ours?|we|yours|(?:by|for|to) us": "the kernel, the caller",
}
"""What is not written, as a regular expression of whole words, and what is."""
PATTERN = re.compile(rf"\b(?:{'|'.join(WORDS)})\b".replace(" ", r"\s+"), re.IGNORECASE)
BIDIRECTIONAL = re.compile(r"(?<![\w/.])bidirectional(?![\w/.])", re.IGNORECASE)
"""In this field the word means "not causal"."""

ALLOWED = {"fastxattn": 0, "benchmarks": 0, "tests": 0, "examples": 0, "csrc": 0}
"""Matches in comments and strings of a folder's sources. None may come back."""


def prose(text: str) -> str:
    """A page without code, drawn tables and comments."""
    text = re.sub(r"<!-- ([\w: -]+?) -->\n.*?<!-- (?:end|/)[\w ]*-->", "", text, flags=re.DOTALL)
    text = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    return re.sub(r"`[^`\n]*`|\]\([^)]*\)|^    .*$", "", text, flags=re.MULTILINE)


def written(path: Path) -> str:
    """Comments and strings of a Python file; comments of any other."""
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".py":
        return "\n".join(a or b for a, b in re.findall(r"//([^\n]*)|/\*(.*?)\*/", text, re.DOTALL))
    kinds = {"COMMENT", "STRING", "FSTRING_MIDDLE"}
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    return "\n".join(t.string for t in tokens if tokenize.tok_name[t.type] in kinds)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_pages_use_the_words_of_the_field(page: Path) -> None:
    text = prose(page.read_text(encoding="utf-8"))
    assert sorted(set(PATTERN.findall(text))) == []
    assert BIDIRECTIONAL.findall(text) == [], "write co-attention"


@pytest.mark.parametrize("folder", ALLOWED)
def test_source_files_use_the_words_of_the_field(folder: str) -> None:
    suffixes = {".py", ".h", ".inl", ".cpp", ".cu", ".cuh"}
    files = [p for p in (ROOT / folder).rglob("*") if p.suffix in suffixes and p.name != "test_language.py"]
    found = {str(p.relative_to(ROOT)): n for p in files if (n := len(PATTERN.findall(written(p))))}
    assert sum(found.values()) <= ALLOWED[folder], found


def test_words_of_code_are_not_counted() -> None:
    page = (
        "A `room` and [it](room.md).\n```python\nroom = 1\n```\n    room\n"
        "<!-- table: x -->\n| gave |\n<!-- end table -->\n"
    )
    assert PATTERN.findall(prose(page)) == []
    assert PATTERN.findall(prose(page + "The kernel's room is left\nalone.")) == ["room", "left\nalone"]
    assert BIDIRECTIONAL.findall("`bidirectional.csv`, bidirectional_attention, Bidirectional loss") == [
        "Bidirectional"
    ]
