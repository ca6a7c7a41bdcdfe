"""What a soak needs beside the random problems: a build with sanitizers, processes that die, files that are broken."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
HANGS = -99
LONGEST = 120.0
"""Seconds that a few broken files may take before they count as hanging."""


@dataclass
class Outcome:
    """What a part did: how often each thing was tried, and what failed."""

    counts: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    skipped: str = ""
    worst: dict[str, float] = field(default_factory=dict)
    """Per operation the largest error as a share of its budget."""
    spread: Counter[str] = field(default_factory=Counter)
    """How many problems had which dtype, instruction set and number of threads."""
    small: int = 0
    """Results a little outside their budget."""


def run(
    command: list[str], timeout: float, variables: dict[str, str] | None = None, given: str | None = None
) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a process on this checkout."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), **(variables or {})}
    with subprocess.Popen(
        command,
        cwd=ROOT,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        stdin=None if given is None else subprocess.PIPE,
    ) as process:
        try:
            said, error = process.communicate(given, timeout=timeout)
        except subprocess.TimeoutExpired:
            process.kill()
            said, error = process.communicate()
            return HANGS, said, "hangs"
        return process.returncode, said, error


def sanitizers() -> tuple[dict[str, str], str]:
    """Environment that runs the CPU library built with AddressSanitizer and UBSan, or why there is none."""
    import build_native
    from fastxattn.runtime import native

    if sys.platform != "linux":
        return {}, "LD_PRELOAD of the sanitizer's runtime needs Linux"
    try:
        tool = build_native.Toolchain.find()
        # What this processor cannot run need not be compiled.
        tool = replace(tool, isas=tuple(isa for isa in tool.isas if isa in native.available_cpu_isas()))
        library = build_native.build_cpu(ROOT / "build/asan", tool, sanitize=True)
    except build_native.NativeBuildError as error:
        return {}, str(error)
    # AddressSanitizer looks for the C++ runtime's throw when it starts, before Python has loaded that runtime.
    wanted = [[tool.cxx[-1], f"-print-file-name={name}"] for name in ("libasan.so", "libstdc++.so.6")]
    found = [subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() for command in wanted]
    return {
        "FASTXATTN_SOAK_LIBRARY": str(library.parent),
        "LD_PRELOAD": " ".join(found),
        "OPENBLAS_NUM_THREADS": "1",
        "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }, ""


def ranks(seconds: float, seed: int) -> Outcome:
    """Processes that compute losses and attention together; one is killed at a random moment; then they start again."""
    outcome, r, end = Outcome(), random.Random(seed), time.monotonic() + seconds
    worker = ROOT / "tests/distributed_worker.py"
    while True:
        world = r.choice((2, 3))
        killed = _launch(worker, world, r)
        outcome.counts["group of processes with one killed"] += 1
        for rank, (code, output) in enumerate(killed[:-1]):
            # A survivor may have finished before; else it must have been told by an error, not left hanging. (gloo may
            # abort the process on its way out after that.)
            if code == HANGS or (code != 0 and "Error" not in output):
                outcome.failures.append(f"rank {rank} of {world} after a kill ended with {code}: {output[-800:]}")
        again = _launch(worker, world, None)
        outcome.counts["group of processes started again, results compared"] += 1
        outcome.failures += [
            f"rank {rank} of {world}, restarted: {out[-800:]}" for rank, (code, out) in enumerate(again) if code != 0
        ]
        if time.monotonic() >= end:
            return outcome


def compositions(seconds: float, seed: int) -> Outcome:
    """Random cells of the composition table, in a process of their own."""
    outcome = Outcome()
    command = [sys.executable, "-m", "benchmarks.soak.compositions", "--seconds", str(seconds), "--seed", str(seed)]
    code, said, error = run(command, seconds + 3 * LONGEST)
    *failures, last = said.splitlines() or [""]
    outcome.counts["cell of the composition table"] += int(last.split()[0]) if last[:1].isdigit() else 0
    if code != 0:
        outcome.failures.append("\n".join(failures) or f"exit {code}: {error[-1500:]}")
    return outcome


def _launch(worker: Path, world: int, kill: random.Random | None) -> list[tuple[int, str]]:
    """Exit code and output of every rank; with ``kill`` the last one gets SIGKILL after up to 6 s."""
    with tempfile.TemporaryDirectory() as folder:
        env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "FASTXATTN_TEST_TIMEOUT": "20"}
        processes = [
            subprocess.Popen(
                [sys.executable, str(worker), "all", str(rank), str(world), f"{folder}/store"],
                env=env,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for rank in range(world)
        ]
        if kill is not None:
            time.sleep(2 + 4 * kill.random())
            processes[-1].send_signal(signal.SIGKILL)
        found = []
        for process in processes:
            try:
                output, _ = process.communicate(timeout=120)
                found.append((process.returncode, output))
            except subprocess.TimeoutExpired:
                process.kill()
                process.communicate()
                found.append((HANGS, "hangs"))
        return found


def broken(data: bytes, r: random.Random) -> tuple[str, bytes]:
    """A copy with bits flipped, bytes cut off, a stretch overwritten, moved or repeated."""
    kind, where = r.choice(("flip", "cut", "overwrite", "repeat", "empty")), r.randrange(len(data))
    length = r.choice((1, 4, 64, 1024))
    if kind == "flip":
        changed = bytearray(data)
        for _ in range(r.choice((1, 8, 64))):
            changed[r.randrange(len(data))] ^= 1 << r.randrange(8)
        return kind, bytes(changed)
    if kind == "cut":
        return kind, data[:where]
    if kind == "overwrite":
        return kind, data[:where] + r.randbytes(length) + data[where + length :]
    if kind == "repeat":
        return kind, data[:where] + data[where : where + length] * 3 + data[where + length :]
    return kind, b""


FEED = """
import json, sys
import numpy as np, onnx
from fastxattn import export
from fastxattn.export.session import session_options
import onnxruntime
onnxruntime.set_default_logger_severity(4)
for line in sys.stdin:
    path = line.strip()
    said = []
    for job in ("inspect", "optimize", "load"):
        print("begin", job, path, flush=True)
        try:
            if job == "inspect":
                export.inspect(path)
            elif job == "optimize":
                export.optimize(path, path + ".out.onnx", overwrite=True)
            else:
                session = onnxruntime.InferenceSession(path, session_options(library=True))
                feeds = {}
                for value in session.get_inputs():
                    shape = [3 if not isinstance(n, int) else n for n in value.shape]
                    kind = {"tensor(float)": np.float32, "tensor(int32)": np.int32, "tensor(int64)": np.int64,
                            "tensor(bool)": np.bool_}.get(value.type, np.float32)
                    feeds[value.name] = np.zeros([min(n, 64) for n in shape], kind)
                session.run(None, feeds)
            said.append("accepted")
        except Exception as error:
            said.append(type(error).__name__)
        print("end", job, said[-1], flush=True)
"""


def files(seconds: float, seed: int) -> Outcome:
    """Broken copies of exported files through ``inspect``, ``optimize`` and the runtime: errors, never a crash."""
    outcome, end = Outcome(), time.monotonic() + seconds
    with tempfile.TemporaryDirectory() as folder:
        originals = list(_exported(Path(folder)))
        while True:
            r = random.Random(seed)
            paths = []
            for i in range(40):
                _, data = broken(r.choice(originals), r)
                path = Path(folder) / f"{seed}_{i}.onnx"
                path.write_bytes(data)
                paths.append(str(path))
            code, said, error = run([sys.executable, "-c", FEED], LONGEST, given="\n".join(paths) + "\n")
            last = ""
            for line in said.splitlines():
                if not line.startswith(("begin ", "end ")):  # libraries write there too
                    continue
                word, job, rest = line.split(" ", 2)
                last = line if word == "begin" else ""
                if word == "end":
                    outcome.counts[f"{job} of a broken file: {'accepted' if rest == 'accepted' else 'refused'}"] += 1
            if code != 0:
                outcome.failures.append(f"files, seed {seed}, {last}: exit {code}, {error[-800:]}")
            seed += 1
            if time.monotonic() >= end:
                return outcome


def _exported(folder: Path) -> Iterator[bytes]:
    """Files with each fastxattn node, and one with attention of standard operators."""
    import torch

    from fastxattn import export
    from tests.export import models

    class Plain(torch.nn.Module):
        def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            return torch.softmax(q @ k.mT * 8**-0.5, -1) @ v

    text, image = models.packed(3, 2), models.packed(5, 4, width=24)
    scored = models.packed(5, 4, width=16)
    sources: tuple[tuple[torch.nn.Module, tuple[Any, ...]], ...] = (
        (models.Varlen(), (text, image)),
        (models.Padded(), models.padded_inputs()),
        (models.Context(), (text, scored)),
        (models.Importance(), (text, scored)),
        (models.Prune(), (image,)),
        (Plain(), tuple(torch.randn(2, n, 2, 8) for n in (3, 5, 5))),
    )
    for module, args in sources:
        path = folder / f"{type(module).__name__}.onnx"
        export.to_onnx(module.eval(), args, path)
        yield path.read_bytes()
