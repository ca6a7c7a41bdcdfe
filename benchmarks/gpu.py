"""Everything a GPU proves, in parts that can be resumed: ``python -m benchmarks.gpu [--part NAME] [--fresh]``.

Parts: ``tests`` (the contracts of the Triton and CUDA kernels on the device), ``sanitizer`` (compute-sanitizer's
memcheck over a part of them, when the tool is there) and ``bench`` (every operation against its rivals, to
benchmarks/results/gpu.csv). A part that has finished on this device and revision is skipped.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from statistics import geometric_mean

import torch

from benchmarks import gpu_cases
from benchmarks.common import RESULTS
from benchmarks.harness import Record, run_cases, write_csv
from benchmarks.harness.records import git_sha
from benchmarks.harness.report import print_table
from fastxattn.runtime import tuning

ROOT = Path(__file__).resolve().parents[1]
STATE = ROOT / "build/gpu-state.json"
TESTS = tuple(
    f"tests/test_{name}.py"
    for name in (
        "gpu",
        "attention_triton",
        "attention_cuda",
        "importance",
        "co_attention",
        "contrastive_gpu",
        "late_interaction_gpu",
        "retrieval_triton",
        "pruning_gpu",
    )
)


def run_tests(match: str) -> None:
    """The contracts on the device."""
    subprocess.run([sys.executable, "-m", "pytest", "-q", "-k", match, *TESTS], cwd=ROOT, check=True)


def run_sanitizer(match: str) -> None:
    """Accesses outside an allocation, with compute-sanitizer."""
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        print("gpu: compute-sanitizer is not installed; part 'sanitizer' skipped")
        return
    command = [tool, "--tool", "memcheck", "--error-exitcode", "1", sys.executable, "-m", "pytest", "-q", "-k"]
    # torch's allocator hands out parts of what it holds, where an access beyond a tensor is none beyond an allocation.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    subprocess.run([*command, match or "ragged", *TESTS[1:3]], cwd=ROOT, check=True, env=environment)


def bench(match: str) -> None:
    """Times, each beside its check; what attention says is what ``backend="auto"`` tries first from now on."""
    name = torch.cuda.get_device_name()
    records = run_cases(gpu_cases.cases(), match=match, keep=lambda rows: write_csv(RESULTS / "gpu.csv", rows))
    print_table(records, f"on {name}")
    wrong = {r.gate for r in records} - {"ok", "rival"}
    if wrong:
        raise SystemExit("gpu: wrong results, for which no time is reported:\n" + "\n".join(sorted(wrong)))
    prefer(records, name)


def prefer(records: list[Record], device: str) -> None:
    """Write down which backend was faster in 16-bit attention, all its cases counting alike."""
    spent: dict[str, list[float]] = {}
    for r in records:
        if r.op == "attention" and r.dtype != "float32" and r.provider.startswith("fastxattn"):
            spent.setdefault(r.provider.removeprefix("fastxattn "), []).append(r.median_ms)
    if spent:
        tuning.prefer("attention", "plain", 64, {n: geometric_mean(times) for n, times in spent.items()}, device)


PARTS = {"tests": run_tests, "sanitizer": run_sanitizer, "bench": bench}


def main() -> None:
    """Run the parts that have not run yet on this device and revision."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--part", choices=PARTS, action="append", help="only these")
    parser.add_argument("--match", default="", help="only tests or cases whose name contains this; marks nothing done")
    parser.add_argument("--fresh", action="store_true", help="run finished parts again")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("gpu: no CUDA or ROCm device is visible to torch here; run this on a machine that has one")
    here = f"{torch.cuda.get_device_name()} {git_sha()}"
    state = json.loads(STATE.read_text()) if STATE.exists() and not options.fresh else {}
    for name in options.part or PARTS:
        if name in state.get(here, []) and not options.match:
            print(f"gpu: part {name!r} has finished before; --fresh runs it again")
            continue
        PARTS[name](options.match)
        if not options.match:
            state.setdefault(here, []).append(name)
            STATE.parent.mkdir(parents=True, exist_ok=True)
            STATE.write_text(json.dumps(state, indent=1))


if __name__ == "__main__":
    main()
