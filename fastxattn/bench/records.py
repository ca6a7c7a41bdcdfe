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


@functools.cache
def device_name() -> str:
    """The processor (and instruction set in use) or GPU that results were measured on."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    from fastxattn.runtime import native

    model = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    return f"{model} [{native.active_cpu_isa() or 'no native library'}]"


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
    gate: str  # "ok": inside the error budget; "rival": not ours; anything else is the failure
    device: str = field(default_factory=device_name)
    versions: str = field(default_factory=versions)
    git_sha: str = field(default_factory=git_sha)
    roofline: float = math.nan  # share of the peak measured in the same run, see fastxattn.bench.roofline


def write_csv(path: Path, records: Iterable[Record]) -> None:
    """Write ``records``, keeping the file's rows for other (op, case, direction, dtype, threads, device)."""
    records = list(records)
    replaced = {_key(r) for r in records}
    kept = [r for r in read_csv(path) if _key(r) not in replaced] if path.exists() else []
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [f.name for f in fields(Record)], lineterminator="\n")
        writer.writeheader()
        for record in kept + records:
            row = asdict(record)
            row["median_ms"], row["ratio"], row["gflops"] = (
                f"{record.median_ms:.5g}",
                f"{record.ratio:.3f}",
                f"{record.gflops:.4g}",
            )
            row["roofline"] = f"{record.roofline:.3f}" if math.isfinite(record.roofline) else ""
            writer.writerow(row)


def _key(record: Record) -> tuple[str, str, str, str, int, str]:
    return record.op, record.case, record.direction, record.dtype, record.threads, record.device


def read_csv(path: Path) -> list[Record]:
    """Rows written by :func:`write_csv`."""
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    casts = {"threads": int, "median_ms": float, "ratio": float, "gflops": float}
    for row in rows:  # files written before there was a roofline have no such column
        row["roofline"] = row.get("roofline") or "nan"
    casts["roofline"] = float
    return [Record(**{name: casts.get(name, str)(value) for name, value in row.items()}) for row in rows]  # type: ignore[arg-type]
