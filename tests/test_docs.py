"""What the documents say is what the CSVs hold, their links lead somewhere, their code runs, and the site builds."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import pages, tables
from benchmarks.common import RESULTS
from benchmarks.harness import read_csv
from benchmarks.harness.sections import kind, read_tables
from fastxattn.integrations import swap
from fastxattn.ops.pruning import STRATEGIES
from tests import doc_setup

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
CODE = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)
# Pages whose snippets run with the names of tests/doc_setup.py: all of the guide's that have any.
RUN = [
    "README.md",
    "docs/guide/index.md",
    "docs/guide/accelerate.md",
    "docs/guide/pruning.md",
    "docs/guide/distributed.md",
    "docs/guide/export.md",
    "docs/guide/concepts.md",
    "docs/guide/modules.md",
    "docs/guide/ops/attention.md",
    "docs/guide/ops/contrastive.md",
    "docs/guide/ops/importance.md",
    "docs/guide/ops/pruning.md",
    "docs/guide/transforms.md",
    "docs/design/extending.md",
]


def test_tables_are_drawn_from_the_csvs() -> None:
    assert tables.stale() == []


def test_a_stale_table_is_noticed() -> None:
    text = "<!-- table: attention -->\n| wrong |\n<!-- end table -->"
    assert "| wrong |" not in tables.updated(text)


def test_no_result_below_one_is_hidden() -> None:
    files = {t.name for t in read_tables(RESULTS) if kind(t) == "speed"} - {"gpu"}  # which has a table of its own
    assert set(tables.SPEEDS) == files
    page = (ROOT / "docs/guide/performance.md").read_text()
    shown = page.partition("<!-- table: below -->")[2].partition("<!-- end table -->")[0].splitlines()
    slower = [
        r
        for name in files
        for r in read_csv(RESULTS / f"{name}.csv")
        if r.provider.startswith("fastxattn") and not r.gate.startswith("prunes") and not r.ratio >= 1
    ]
    assert len(slower) > 10
    for r in slower:
        cell = f"{r.ratio:.3g}x" if r.gate == "ok" else "error budget"
        assert any(r.case in line and f"| {r.direction} |" in line and cell in line for line in shown), r


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_relative_links_exist(page: Path) -> None:
    targets = re.findall(r"\]\((?!https?:|#|mailto:)([^)#]+)", page.read_text())
    assert [t for t in targets if not (page.parent / t).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_snippets_are_python(page: Path) -> None:
    for block in CODE.findall(page.read_text()):
        ast.parse(block)


def test_every_page_of_the_guide_runs() -> None:
    """Pages of examples are compared with their scripts instead, which have tests of their own."""
    guide = [page for page in (ROOT / "docs/guide").rglob("*.md") if page.parent != pages.PAGES]
    assert {str(p.relative_to(ROOT)) for p in guide if CODE.search(p.read_text())} <= set(RUN)


@pytest.mark.parametrize("page", RUN)
def test_snippets_run(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every block of the page, in order, in one namespace, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(swap, "_adapters", dict(swap._adapters))
    strategies = dict(STRATEGIES)
    namespace = doc_setup.names(page)
    if page == "docs/guide/distributed.md":
        torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=torch.distributed.HashStore())
    blocks = CODE.findall((ROOT / page).read_text())
    assert blocks
    try:
        for block in blocks:
            if 'inspect("theirs.onnx")' in block:
                shutil.copy("model.onnx", "theirs.onnx")
            exec(compile(block, page, "exec"), namespace)
    finally:
        STRATEGIES.clear()
        STRATEGIES.update(strategies)
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    if hasattr(found := namespace.get("report"), "swapped"):  # what a snippet's accelerate() did
        assert "exceeds the budget" not in str(found)


@pytest.mark.parametrize("name", pages.EXAMPLES)
def test_executed_pages_are_of_the_scripts_that_are_there(name: str) -> None:
    text = (pages.PAGES / f"{name}.md").read_text()
    script = pages.script(name).read_text()
    assert pages.code_of(text) == script, f"run `python -m benchmarks.pages {name}`"
    assert pages.code_of(pages.page(name, "said").replace("import torch", "")) != script
    assert re.search(rf"^```\n\$ python examples/{name}\.py\n.+\n```$", text, re.DOTALL | re.MULTILINE)
    shown = f"](../../images/{pages.picture(name).name})" in text and pages.picture(name).exists()
    assert shown == pages.EXAMPLES[name]


def test_troubleshooting_quotes_messages_that_exist() -> None:
    sources = [*(ROOT / "fastxattn").rglob("*.py"), ROOT / "build_native.py"]
    said = "\n".join(path.read_text() for path in sources)
    quoted = re.findall(r"\*\*`([^`]+)`\*\*|\*\*`([^`]+)`\.\*\*", (ROOT / "docs/guide/troubleshooting.md").read_text())
    assert len(quoted) > 15
    assert [a or b for a, b in quoted if (a or b) not in said] == []


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
    )
    assert done.returncode == 0, done.stderr
    home = (tmp_path / "site/index.html").read_text()
    for page in PAGES[1:]:
        if page.name != "index.md":
            assert f"{page.relative_to(ROOT / 'docs').with_suffix('').as_posix()}/" in home, f"{page} is not in the nav"
    assert "varlen_cross_attention" in (tmp_path / "site/reference/attention/index.html").read_text()
