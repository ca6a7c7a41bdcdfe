"""accelerate() on real models: ``python -m benchmarks.bench_models [--match text] [--rounds n]``.

Rows go to ``benchmarks/results/models.csv``; the table ``docs/models.md`` is written from them and from what
``accelerate`` reports (``--table`` alone rewrites it).
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from benchmarks.models_zoo import SYSTEMS, System
from fastxattn.bench import Case, Workload, read_csv, write_csv
from fastxattn.bench.registry import run_case
from fastxattn.integrations import accelerate
from fastxattn.testing import measure_error

ROOT = Path(__file__).resolve().parents[1]
CSV, FACTS, DOC = (
    ROOT / "benchmarks/results/models.csv",
    ROOT / "benchmarks/results/models_facts.json",
    ROOT / "docs/models.md",
)


def cast(inputs: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    return pytree.tree_map(lambda x: x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x, inputs)


def outputs(system: System, model: nn.Module, inputs: dict[str, Any]) -> list[Tensor]:
    out = model(**inputs)
    if system.keep is not None:
        return system.keep(out)
    if isinstance(out, Tensor):
        return [out]
    if hasattr(out, "last_hidden_state"):
        return [out.last_hidden_state]
    return [t for t in pytree.tree_leaves(out) if isinstance(t, Tensor)]


def attention_share(model: nn.Module, run: Callable[[], object]) -> float:
    """Share of a call's time inside attention modules, their projections included."""
    inside, started, handles = [0.0], [0.0], []

    def is_attention(module: nn.Module) -> bool:
        return bool(re.search("Atte?n", type(module).__name__))

    def begin(module: nn.Module, arguments: Any) -> None:
        started[0] = time.perf_counter()

    def end(module: nn.Module, arguments: Any, result: Any) -> None:
        inside[0] += time.perf_counter() - started[0]

    for module in model.modules():
        children = [m for m in module.modules() if m is not module]
        if is_attention(module) and not any(is_attention(m) for m in children):
            handles += [module.register_forward_pre_hook(begin), module.register_forward_hook(end)]
    start = time.perf_counter()
    run()
    total = time.perf_counter() - start
    for handle in handles:
        handle.remove()
    return inside[0] / total


def workload(system: System, dtype: torch.dtype, train: bool, facts: dict[str, Any]) -> Workload:
    torch.manual_seed(0)
    model, inputs = system.build()
    inputs = cast(inputs, dtype)
    model = model.eval().to(dtype)
    fast = copy.deepcopy(model)
    report = accelerate(fast)

    def run(m: nn.Module) -> Callable[[], object]:
        def forward() -> object:
            with torch.no_grad():
                return m(**inputs)

        def step() -> None:
            out = sum(x.float().square().mean() for x in outputs(system, m, inputs))
            out.backward()  # type: ignore[union-attr]
            m.zero_grad(set_to_none=True)

        return step if train else forward

    def check() -> str:
        with torch.no_grad():
            ours, eager = outputs(system, fast, inputs), outputs(system, model, inputs)
            wide = copy.deepcopy(model).double()
            reference = outputs(system, wide, cast(inputs, torch.float64))
        reports = [measure_error("output", *three) for three in zip(ours, reference, eager, strict=True)]
        worst = max(reports, key=lambda r: r.max_error / max(r.max_budget, 1e-30))
        name = str(dtype).removeprefix("torch.")
        facts.setdefault(system.name, {})[name] = {
            "error": worst.max_error,
            "original_error": max(r.max_budget for r in reports) / 2,
            "share": attention_share(model, run(model)),
            "swapped": sorted({f"{s.module.rpartition('.')[2]}" for s in report.swapped}),
        }
        return "ok" if all(r.same_nonfinite and r.max_error <= r.max_budget for r in reports) else str(worst)

    return Workload({"sdpa": run(model), "fastxattn": run(fast)}, "sdpa", check)


def table(facts: dict[str, Any]) -> str:
    records = [r for r in read_csv(CSV) if r.provider == "fastxattn"]
    lines = [
        "| system | swapped classes | pass | dtype | sdpa ms | ms | speed-up | error | in attention | bound by |",
        "|---|---|---|---|---:|---:|---:|---:|---:|---|",
    ]
    by_name = {system.name: system for system in SYSTEMS}
    for name, system in by_name.items():
        for record in (r for r in records if r.case == name):
            fact = facts[name][record.dtype]
            sdpa = next(r for r in read_csv(CSV) if r.provider == "sdpa" and (r.case, r.direction, r.dtype) == (
                record.case, record.direction, record.dtype))  # fmt: skip
            speed = f"{record.ratio:.2f}x" if record.gate == "ok" else record.gate
            lines.append(
                f"| {name} | {', '.join(fact['swapped'])} | {record.direction} | {record.dtype} | {sdpa.median_ms:.3g} "
                f"| {record.median_ms:.3g} | {speed} | {fact['error']:.1e} | {fact['share']:.0%} | {system.note} |"
            )
    return "\n".join(lines) + "\n"


def write_document(facts: dict[str, Any]) -> None:
    text = DOC.read_text() if DOC.exists() else "<!-- table -->\n<!-- /table -->\n"
    before, _, rest = text.partition("<!-- table -->")
    after = rest.partition("<!-- /table -->")[2]
    DOC.write_text(f"{before}<!-- table -->\n{table(facts)}<!-- /table -->{after}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--match", default="", help="only systems whose name contains this")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--forward", action="store_true", help="no training passes")
    parser.add_argument("--table", action="store_true", help="only rewrite docs/models.md")
    options = parser.parse_args()
    torch.set_num_threads(2)
    facts = json.loads(FACTS.read_text()) if FACTS.exists() else {}
    for system in [] if options.table else SYSTEMS:
        if options.match not in system.name:
            continue
        for dtype in system.dtypes:
            for direction in ("forward", "forward+backward"):
                train = direction != "forward"
                if train and (options.forward or not system.train):
                    continue
                case = Case("models", system.name, direction, dtype, lambda: workload(system, dtype, train, facts))  # noqa: B023
                records = run_case(case, rounds=options.rounds)
                gc.collect()
                for r in records:
                    print(
                        f"{r.case} {r.direction} {r.dtype} {r.provider}: {r.median_ms:.4g} ms {r.ratio:.2f}x {r.gate}",
                        flush=True,
                    )
                write_csv(CSV, records)
                FACTS.write_text(json.dumps(facts, indent=1, sort_keys=True) + "\n")
    write_document(facts)


if __name__ == "__main__":
    main()
