"""Everything a GPU proves, in parts that can be resumed: ``python benchmarks/gpu.py [--part NAME] [--fresh]``.

Parts: ``tests`` (the Triton contracts on the device), ``sanitizer`` (compute-sanitizer's memcheck over a part of them,
when the tool is there), ``attention`` (against SDPA, varlen_attn, compiled FlexAttention and flash-attn),
``importance`` (against the forward and flash-colreduce) and ``bidirectional`` (against two calls of attention). A part
that has finished on this device and revision is skipped. Written on a machine without a GPU: until somebody runs it on
one, no figure of it exists.
"""

from __future__ import annotations

import argparse
import csv
import json
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

import fastxattn
from fastxattn.ops.bidirectional.dispatch import ONE_PASS
from fastxattn.runtime import native, tuning

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks/results"
STATE = ROOT / "build/gpu-state.json"
Provider = Callable[[], object]
TESTS = tuple(
    f"tests/test_{name}.py"
    for name in (
        "attention_triton", "attention_cuda", "importance", "bidirectional", "contrastive_triton",
        "late_interaction_triton", "retrieval_triton", "pruning_triton",
    )
)  # fmt: skip


def lengths(low: int, high: int, batch: int, seed: int) -> list[int]:
    """Sequence lengths, uniform in [low, high]."""
    return torch.randint(low, high + 1, (batch,), generator=torch.Generator().manual_seed(seed)).tolist()


SHAPES = {
    "text to image": (lengths(5, 77, 64, 0), lengths(64, 1024, 64, 1)),
    "image to text": (lengths(64, 1024, 64, 1), lengths(5, 77, 64, 0)),
    "Q-Former 32 x 4096": ([32] * 16, [4096] * 16),
    "decode 1 x 4096": ([1] * 64, [4096] * 64),
    "dense 1024": ([1024] * 8, [1024] * 8),
}


def offsets(of: list[int]) -> Tensor:
    """Running sums from 0, int32, on the device."""
    return torch.tensor([0, *torch.tensor(of).cumsum(0).tolist()], dtype=torch.int32, device="cuda")


def providers(q: Tensor, k: Tensor, v: Tensor, of_q: list[int], of_k: list[int]) -> dict[str, Provider]:
    """Ways to compute the same packed attention; those not installed are left out."""
    cu_q, cu_k, most_q, most_k = offsets(of_q), offsets(of_k), max(of_q), max(of_k)
    ways: dict[str, Provider] = {
        "fastxattn triton": lambda: fastxattn.varlen_cross_attention(q, k, v, cu_q, cu_k, backend="triton")
    }
    if native.cuda_library().reason is None:
        ways["fastxattn cuda"] = lambda: fastxattn.varlen_cross_attention(q, k, v, cu_q, cu_k, backend="cuda")
    try:
        from torch.nn.attention.varlen import varlen_attn

        ways["varlen_attn"] = lambda: varlen_attn(q, k, v, cu_q, cu_k, most_q, most_k)
    except ImportError:
        pass
    try:
        from flash_attn import flash_attn_varlen_func

        ways["flash-attn"] = lambda: flash_attn_varlen_func(q, k, v, cu_q, cu_k, most_q, most_k)
    except ImportError:
        pass
    padded = [torch.nn.utils.rnn.pad_sequence(x.split(n), batch_first=True).transpose(1, 2).contiguous()
              for x, n in ((q, of_q), (k, of_k), (v, of_k))]  # fmt: skip
    length_k = torch.tensor(of_k, device="cuda")
    mask = (torch.arange(most_k, device="cuda") < length_k[:, None])[:, None, None]
    whole = min(of_k) == most_k
    sdpa = torch.nn.functional.scaled_dot_product_attention
    ways["padded SDPA"] = lambda: sdpa(*padded, attn_mask=None if whole else mask)
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    flex = torch.compile(flex_attention)
    block_mask = create_block_mask(lambda b, h, i, j: j < length_k[b], len(of_q), None, most_q, most_k, device="cuda")
    ways["FlexAttention"] = lambda: flex(*padded, block_mask=block_mask)
    return ways


def milliseconds(ways: dict[str, Provider], rounds: int = 30) -> dict[str, float]:
    """Median device time of each, interleaved on the same data."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for way in ways.values():
        for _ in range(3):
            way()
    for _ in range(rounds):
        for name, way in ways.items():
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            way()
            end.record()
            end.synchronize()
            times[name].append(start.elapsed_time(end))
    return {name: statistics.median(values) for name, values in times.items()}


def write(name: str, rows: list[dict[str, object]]) -> None:
    """One CSV with the device and versions on every row."""
    facts = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "revision": revision()}
    RESULTS.mkdir(parents=True, exist_ok=True)
    with (RESULTS / f"{name}.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0], *facts], lineterminator="\n")
        writer.writeheader()
        writer.writerows(row | facts for row in rows)


def bench_attention() -> None:
    """Forward of every shape, beside float64 on the same rounded inputs: no speed without a right result."""
    rows: list[dict[str, object]] = []
    spent: dict[str, float] = {}
    for shape, (of_q, of_k) in SHAPES.items():
        for dtype in (torch.float16, torch.bfloat16):
            q = torch.randn(sum(of_q), 16, 64, device="cuda", dtype=dtype)
            k, v = (torch.randn(sum(of_k), 16, 64, device="cuda", dtype=dtype) for _ in range(2))
            ways = providers(q, k, v, of_q, of_k)
            first = [x[: n[0]].double().transpose(0, 1) for x, n in ((q, of_q), (k, of_k), (v, of_k))]
            exact = torch.nn.functional.scaled_dot_product_attention(*first).transpose(0, 1)
            error = 0.0
            for name in (n for n in ways if n.startswith("fastxattn")):
                ours = ways[name]()
                assert isinstance(ours, Tensor)
                error = (ours[: of_q[0]].double() - exact).abs().max().item()
                if error > 8 * torch.finfo(dtype).eps:
                    raise SystemExit(f"gpu: {shape} {dtype} {name}: error {error:.2e} against float64, so no speed")
            times = milliseconds(ways)
            for name, time in times.items():
                spent[name] = spent.get(name, 0.0) + time / min(times.values())
                rows.append(
                    {"shape": shape, "dtype": str(dtype), "provider": name, "ms": f"{time:.4f}", "error": error}
                )
                print(shape, dtype, name, f"{time:.3f} ms", flush=True)
    write("gpu_attention", rows)
    # Relative to the fastest, so that every shape counts alike; backend="auto" reads it.
    own = {name.removeprefix("fastxattn "): spent[name] for name in spent if name.startswith("fastxattn")}
    tuning.prefer("attention", "plain", 64, own, torch.cuda.get_device_name())


def bench_importance() -> None:
    """Key importance beside the forward of the same shape and, where a shape is dense, flash-colreduce."""
    try:
        from flash_colreduce import flash_colreduce
    except ImportError:
        flash_colreduce = None
        print(
            "gpu: flash-colreduce is not installed (pip install flash-colreduce); importance has no rival in this run"
        )
    rows: list[dict[str, object]] = []
    for shape, (of_q, of_k) in SHAPES.items():
        q = torch.randn(sum(of_q), 16, 64, device="cuda", dtype=torch.bfloat16)
        k = torch.randn(sum(of_k), 16, 64, device="cuda", dtype=torch.bfloat16)
        cu_q, cu_k = offsets(of_q), offsets(of_k)
        _, lse = fastxattn.varlen_cross_attention(q, k, k, cu_q, cu_k, return_lse=True)
        ways: dict[str, Provider] = {
            "forward": partial(fastxattn.varlen_cross_attention, q, k, k, cu_q, cu_k),
            "importance": partial(fastxattn.key_importance, q, k, lse, cu_q, cu_k),
        }
        dense = (
            [x.unflatten(0, (len(of_q), -1)).transpose(1, 2) for x in (q, k)] if equal(of_q) and equal(of_k) else None
        )
        exact = None
        if dense is not None:
            scores = (dense[0][0].double() @ dense[1][0].double().mT) / 8
            exact = scores.softmax(-1).sum(1).mean(0)  # of the first sequence
            if flash_colreduce is not None:
                rival = partial(flash_colreduce, *(x.contiguous() for x in dense), reduction="sum")
                if gate(shape, "flash-colreduce", rival()[0].double().mean(0), exact):
                    ways["flash-colreduce"] = rival
            if not gate(
                shape, "importance", fastxattn.key_importance(q, k, lse, cu_q, cu_k)[: of_k[0]].double(), exact
            ):
                raise SystemExit(f"gpu: {shape}: key importance is wrong; no speed is reported")
        for name, time in milliseconds(ways).items():
            rows.append({"shape": shape, "provider": name, "ms": f"{time:.4f}"})
    write("gpu_importance", rows)


def equal(of: list[int]) -> bool:
    """Whether all lengths are the same."""
    return min(of) == max(of)


def gate(shape: str, name: str, found: Tensor, exact: Tensor) -> bool:
    """Whether column sums are right to what 16-bit products allow; says so when not."""
    error = ((found - exact).abs() / exact.abs().clamp(min=1e-3)).max().item()
    if error > 0.02:
        print(f"gpu: {shape}: {name} is off by {error:.1%} against float64; no speed is reported for it")
    return error <= 0.02


def bench_bidirectional() -> None:
    """Forward and backward of co-attention: shared scores against two calls of attention."""
    from fastxattn.ops.bidirectional import triton as room

    rows: list[dict[str, object]] = []
    for shape, (of_a, of_b) in SHAPES.items():
        a, b = (
            torch.randn(sum(of), 16, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True) for of in (of_a, of_b)
        )
        cu_a, cu_b = offsets(of_a), offsets(of_b)

        def step(pays: bool, a: Tensor = a, b: Tensor = b, cu_a: Tensor = cu_a, cu_b: Tensor = cu_b) -> None:
            ONE_PASS["triton"] = lambda problem: pays
            out_a, out_b = fastxattn.bidirectional_attention(a, b, a, b, cu_a, cu_b)
            torch.autograd.grad((out_a, out_b), (a, b), (out_a, out_b))

        try:
            found = milliseconds({"shared scores": partial(step, True), "two calls": partial(step, False)})
        finally:
            ONE_PASS["triton"] = room.pays
        rows += [{"shape": shape, "provider": name, "ms": f"{time:.4f}"} for name, time in found.items()]
    write("gpu_bidirectional", rows)


def run_tests() -> None:
    """The contracts on the device."""
    subprocess.run([sys.executable, "-m", "pytest", "-q", *TESTS], cwd=ROOT, check=True)


def run_sanitizer() -> None:
    """Out-of-bounds accesses, with compute-sanitizer."""
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        print("gpu: compute-sanitizer is not installed; part 'sanitizer' skipped")
        return
    command = [
        tool,
        "--tool",
        "memcheck",
        "--error-exitcode",
        "1",
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-k",
        "ragged",
    ]
    subprocess.run([*command, TESTS[0]], cwd=ROOT, check=True)


PARTS = {
    "tests": run_tests,
    "sanitizer": run_sanitizer,
    "attention": bench_attention,
    "importance": bench_importance,
    "bidirectional": bench_bidirectional,
}


def revision() -> str:
    """The commit, or "unknown" outside a repository."""
    done = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return done.stdout.strip() or "unknown"


def main() -> None:
    """Run the parts that have not run yet on this device and revision."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--part", choices=PARTS, action="append", help="only these")
    parser.add_argument("--fresh", action="store_true", help="run finished parts again")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("gpu: no CUDA or ROCm device is visible to torch here; run this on a machine that has one")
    here = f"{torch.cuda.get_device_name()} {revision()}"
    state = json.loads(STATE.read_text()) if STATE.exists() and not options.fresh else {}
    for name in options.part or PARTS:
        if name in state.get(here, []):
            print(f"gpu: part {name!r} has finished before; --fresh runs it again")
            continue
        PARTS[name]()
        state.setdefault(here, []).append(name)
        STATE.parent.mkdir(parents=True, exist_ok=True)
        STATE.write_text(json.dumps(state, indent=1))


if __name__ == "__main__":
    main()
