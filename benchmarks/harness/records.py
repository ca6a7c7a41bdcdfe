"""The one CSV schema of every benchmark, and where a row was measured."""

from __future__ import annotations

import csv
import functools
import math
import platform
import subprocess
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import torch

from fastxattn.runtime.timing import device_name


@functools.cache
def versions() -> str:
    """Versions that a result depends on."""
    from fastxattn import __version__

    return f"fastxattn {__version__}; torch {torch.__version__}; python {platform.python_version()}"


@functools.cache
def git_sha() -> str:
    """Short commit id of the source tree, with ``+`` when it has uncommitted changes; empty outside a checkout."""
    root = Path(__file__).resolve().parents[2]
    command = ["git", "-C", str(root), "describe", "--always", "--dirty=+", "--exclude=*"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else ""


@dataclass(frozen=True)
class Record:
    """One provider on one case. ``ratio`` > 1 means faster than the case's headline rival."""

    op: str
    case: str
    direction: str  # forward | forward+backward
    provider: str
    rival: str  # the provider that ratios are taken against
    dtype: str
    threads: int
    median_ms: float
    ratio: float  # rival's time / this time, paired by round
    gflops: float  # useful floating-point work per second (padding and masked work not counted); 0: not meaningful
    gate: str  # "ok": inside the error budget; "rival": another project's; anything else is the failure
    device: str = field(default_factory=device_name)
    versions: str = field(default_factory=versions)
    git_sha: str = field(default_factory=git_sha)
    roofline: float = math.nan  # share of its bound, which was measured in the same run: benchmarks.harness.roofline
    bound: str = ""  # compute | memory: what that share is of
    peak_gflops: float = math.nan  # the two bounds
    peak_gbytes: float = math.nan


def write_csv(path: Path, records: Iterable[Record]) -> None:
    """Write ``records``, keeping the file's rows for other (op, case, direction, dtype, threads, device)."""
    records = list(records)
    replaced = {_key(r) for r in records}
    kept = [r for r in read_csv(path) if _key(r) not in replaced] if path.exists() else []
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_suffix(".tmp")  # a run that is ended half-way leaves whole files
    with fresh.open("w", newline="") as file:
        writer = csv.DictWriter(file, [f.name for f in fields(Record)], lineterminator="\n")
        writer.writeheader()
        for record in kept + records:
            row = asdict(record)
            row |= {name: format(row[name], form) for name, form in _FORMS.items()}
            row |= {name: format(row[name], ".3g") if math.isfinite(row[name]) else "" for name in _OPTIONAL}
            writer.writerow(row)
    fresh.replace(path)


_FORMS = {"median_ms": ".5g", "ratio": ".3f", "gflops": ".4g"}
_OPTIONAL = ("roofline", "peak_gflops", "peak_gbytes")
"""Columns that older files lack, and that may be empty."""


def _key(record: Record) -> tuple[str, str, str, str, int, str]:
    return record.op, record.case, record.direction, record.dtype, record.threads, record.device


def read_csv(path: Path) -> list[Record]:
    """Rows written by :func:`write_csv`."""
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    casts = {"threads": int, **dict.fromkeys((*_FORMS, *_OPTIONAL), float)}
    for row in rows:
        row.update({name: row.get(name) or "nan" for name in _OPTIONAL})
    return [Record(**{name: casts.get(name, str)(value) for name, value in row.items()}) for row in rows]  # type: ignore[arg-type]
