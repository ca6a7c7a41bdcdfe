"""Shared parts of the commands: the application, ``--json``, progress, exit codes, the source checkout."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

REPOSITORY = "https://github.com/fastxattn/fastxattn"
# Errors that the user can correct: one line and exit code 2. Any other error is a defect and keeps its traceback.
_EXPECTED = (ValueError, TypeError, RuntimeError, OSError, ImportError)


class Commands(TyperGroup):
    """Reports errors that the user can correct as one line on stderr, with exit code 2."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except (typer.Exit, typer.Abort):  # RuntimeErrors, too
            raise
        except _EXPECTED as error:
            if ctx.params.get("traceback"):
                raise
            typer.echo(f"error: {error} (--traceback before the command shows where)", err=True)
            raise typer.Exit(2) from error


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Fast, exact cross-modal attention, token pruning and contrastive losses for PyTorch.",
    epilog="Exit codes: 0 success, 1 a check failed, 2 wrong usage or unusable input. "
    "Tab completion: fastxattn --install-completion.",
)
Json = Annotated[bool, typer.Option("--json", help="print JSON instead of text")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="replace the file if it exists")]


def _version(asked: bool) -> None:
    if asked:
        import fastxattn

        typer.echo(fastxattn.__version__)
        raise typer.Exit


@app.callback()
def options(
    traceback: Annotated[bool, typer.Option("--traceback", help="show where an error arose")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="print the version; see also env")
    ] = False,
) -> None:
    """Options before the command."""


def plain(value: Any) -> Any:
    """``value`` as JSON can hold it: dataclasses are objects (with ``ok`` where they have one), NaN is null."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {"ok": value.ok, **fields} if hasattr(value, "ok") else fields
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def emit(value: Any, as_json: bool) -> None:
    """Print a result: its own text, or JSON."""
    typer.echo(json.dumps(plain(value), indent=2) if as_json else str(value))


@contextlib.contextmanager
def working(description: str) -> Iterator[Callable[[str], None]]:
    """A spinner with the time spent, on stderr, gone afterwards; yields a function that changes its words."""
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(description, total=None)
        yield lambda text: bar.update(task, description=text)


def checkout() -> Path:
    """The source checkout that this package runs from, or that the current folder is.

    Raises:
        ValueError: neither is one; the wheel holds no benchmarks.
    """
    for root in (Path(__file__).resolve().parents[2], Path.cwd()):
        if (root / "benchmarks/harness/suite.py").exists():
            return root
    raise ValueError(f"the benchmarks are not installed: run this inside a source checkout (git clone {REPOSITORY})")


def from_checkout(module: str) -> Any:
    """Import a module of the checkout's ``benchmarks`` package."""
    root = str(checkout())
    if root not in sys.path:
        sys.path.insert(0, root)
    return importlib.import_module(module)
