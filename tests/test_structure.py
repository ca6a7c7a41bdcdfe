"""The package's structure: no circle between files, and the same floors in every operation."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "fastxattn"
FILES = {
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}
EVERY = {"problem", "checks", "operator", "reference", "backends", "api"}
"""Files of every operation, bottom to top."""
ALLOWED = EVERY | {"__init__", "kernels_triton", "triton", "kernels_cuda", "onnx"}
EXTRA = {
    "attention": {"padded", "dropout", "kernels_flash"},
    "pruning": {"budget", "merge", "rows", "scores", "segments", "selection", "strategies"},
    "contrastive": {"fused", "windows"},
    "absorbed_attention": {"cost"},
}
"""Files for a part that one operation alone has."""


def ignored(tree: ast.Module) -> set[ast.AST]:
    """Imports for annotations alone."""
    blocks = (n for n in ast.walk(tree) if isinstance(n, ast.If) and ast.unparse(n.test).endswith("TYPE_CHECKING"))
    return {node for block in blocks for statement in block.body for node in ast.walk(statement)}


def imported(name: str) -> Iterator[str]:
    """Modules that a file imports, wherever in the file; ``importlib`` loads lazily and does not count."""
    tree = ast.parse(FILES[name].read_text())
    skipped = ignored(tree)
    for node in ast.walk(tree):
        if node in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in FILES)
        elif isinstance(node, ast.ImportFrom) and node.module in FILES:
            inside = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (module for module in inside if module in FILES)
            if any(module not in FILES for module in inside):
                yield node.module


GRAPH = {name: {other for other in imported(name) if other != name} for name in FILES}


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Groups of files that reach each other (Tarjan's strongly connected components of two or more)."""
    number: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(name: str) -> None:
        number[name] = low[name] = len(number)
        stack.append(name)
        for other in graph[name]:
            if other not in number:
                visit(other)
                low[name] = min(low[name], low[other])
            elif other in stack:
                low[name] = min(low[name], number[other])
        if low[name] == number[name]:
            group = stack[stack.index(name) :]
            del stack[stack.index(name) :]
            if len(group) > 1:
                found.append(sorted(group))

    for name in graph:
        if name not in number:
            visit(name)
    return sorted(found)


def test_no_circle_between_files() -> None:
    assert circles(GRAPH) == []


def test_a_circle_is_found() -> None:
    graph = {"a": {"b"}, "b": {"c"}, "c": {"b", "d"}, "d": set(), "e": {"f"}, "f": {"e", "a"}}
    assert circles(graph) == [["b", "c"], ["e", "f"]]
    assert circles({"a": {"b"}, "b": {"c"}, "c": set()}) == []


@pytest.mark.parametrize("folder", sorted(p.parent for p in PACKAGE.glob("ops/*/__init__.py")), ids=lambda p: p.name)
def test_every_operation_has_the_same_floors(folder: Path) -> None:
    found = {path.stem for path in folder.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert found - ALLOWED - EXTRA.get(folder.name, set()) == set()
    assert EVERY - found == set()
