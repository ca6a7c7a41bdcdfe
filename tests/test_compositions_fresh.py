"""The cells of the composition table that need processes of their own; a file of its own, for another worker."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.compositions import table
from tests.compositions.fresh import IN_OTHER_PROCESSES
from tests.compositions.judge import judge
from tests.compositions.rows import ROWS

ROOT = Path(__file__).resolve().parents[1]


def test_cells_of_fresh_processes(tmp_path: Path) -> None:
    """Compiled calls as the first use of a process, and calls after a fork."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-m", "tests.compositions.fresh"],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        timeout=3600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    cells = [json.loads(line) for line in done.stdout.splitlines()]
    wanted = {(row.name, c) for row in ROWS for c in IN_OTHER_PROCESSES if table.applies(row, c)}
    assert {(cell["row"], cell["column"]) for cell in cells} == wanted
    assert [fault for cell in cells if (fault := judge(cell["row"], cell["column"], cell["outcome"]))] == []
