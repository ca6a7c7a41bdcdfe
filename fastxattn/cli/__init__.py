"""The ``fastxattn`` command. Needs the ``cli`` extra (typer, rich); each command imports what it uses.

Exit codes: 0 success; 1 a check failed (outputs disagree, a file fails its verification or lint, slower than before);
2 wrong usage, or input or installation that cannot serve.
"""

from __future__ import annotations

import sys

try:
    import typer  # noqa: F401
except ImportError:  # the library itself needs neither typer nor rich
    sys.exit("the fastxattn command needs typer and rich: pip install 'fastxattn[cli]'")

from fastxattn.cli import demos, environment, measure, onnx_files
from fastxattn.cli.common import app

__all__ = ["app", "demos", "environment", "main", "measure", "onnx_files"]


def main() -> None:
    """Entry point of the ``fastxattn`` command."""
    app(prog_name="fastxattn")
