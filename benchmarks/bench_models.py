"""accelerate() on real models: ``python -m benchmarks.bench_models --missing --minutes 5``, until nothing is missing.

Rows go to ``benchmarks/results/models.csv``; the table ``docs/guide/models.md`` is written from them and from what
``accelerate`` reports (``--table`` alone rewrites it).
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import gc
import json
import os
import re
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from benchmarks import models_zoo, models_zoo_open_clip
from benchmarks.harness import Case, Record, Workload, read_csv, write_csv
from benchmarks.harness.registry import Pending, run_case
from benchmarks.harness.report import short_device
from benchmarks.models_zoo import System
from fastxattn.integrations import accelerate
from fastxattn.runtime.timing import device_name
from fastxattn.testing import ErrorReport, measure_error

ROOT = Path(__file__).resolve().parents[1]
CSV, FACTS, DOC = (
    ROOT / "benchmarks/results/models.csv",
    ROOT / "benchmarks/results/models_facts.json",
    ROOT / "docs/guide/models.md",
)

Row = tuple[System, torch.dtype, str]
SYSTEMS = models_zoo.SYSTEMS + models_zoo_open_clip.SYSTEMS


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


def first(system: System, inputs: dict[str, Any]) -> dict[str, Any]:
    """The part of the batch that is compared with float64."""
    if system.checked is None:
        return inputs
    batch = max(x.shape[0] for x in inputs.values())
    return {k: x[: system.checked] if x.shape[0] == batch else x for k, x in inputs.items()}


def attention_share(model: nn.Module, run: Callable[[], object]) -> tuple[float, float]:
    """Share of a call's time inside attention modules, their projections included, and the seconds it took."""
    inside, started, handles = [0.0], [0.0], []

    def is_attention(module: nn.Module) -> bool:
        return bool(re.search("Atte?n", type(module).__name__))

    def begin(module: nn.Module, arguments: Any) -> None:
        started[0] = clock()()

    def end(module: nn.Module, arguments: Any, result: Any) -> None:
        inside[0] += clock()() - started[0]

    for module in model.modules():
        children = [m for m in module.modules() if m is not module]
        if is_attention(module) and not any(is_attention(m) for m in children):
            handles += [module.register_forward_pre_hook(begin), module.register_forward_hook(end)]
    now = clock()
    start = now()
    run()
    total = now() - start
    for handle in handles:
        handle.remove()
    return inside[0] / total, total


def twin(model: nn.Module) -> nn.Module:
    """A copy with the same parameters: large models are held once."""
    return copy.deepcopy(model, {id(p): p for p in model.parameters()})


@contextlib.contextmanager
def widened(model: nn.Module, lean: bool) -> Iterator[nn.Module]:
    """``model`` in float64: a copy, or (``lean``) itself with one layer's weights at a time."""
    if not lean:
        yield copy.deepcopy(model).double()
        return
    dtype, handles = next(model.parameters()).dtype, []

    def to(module: nn.Module, wanted: torch.dtype) -> None:
        for p in module.parameters(recurse=False):
            p.data = p.data.to(wanted)

    for module in model.modules():
        if isinstance(module, nn.Embedding):  # the first of them is what a model calls its dtype
            to(module, torch.float64)
        else:
            handles.append(module.register_forward_pre_hook(lambda m, _: to(m, torch.float64)))
            handles.append(module.register_forward_hook(lambda m, _, out: to(m, dtype)))
    try:
        yield model
    finally:
        for handle in handles:
            handle.remove()
        for module in model.modules():
            to(module, dtype)


def gradients(system: System, model: nn.Module, inputs: dict[str, Any]) -> list[Tensor]:
    """Of every parameter, each scaled to the size of its own largest entry."""
    model.zero_grad(set_to_none=True)
    loss(system, model, inputs).backward()
    found = [p.grad for p in model.parameters() if p.grad is not None]
    model.zero_grad(set_to_none=True)
    return found


def loss(system: System, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    """A weighted sum: the square of normalised outputs has no gradient to compare.

    The weights are drawn: of ordered ones a bias's gradient would be a sum that cancels in one order of the rows only.
    """
    generator = torch.Generator().manual_seed(0)
    parts = []
    for x in outputs(system, model, inputs):
        weights = torch.rand(x.shape, generator=generator, dtype=torch.float64) * 2 - 1
        parts.append((x * weights.to(x.dtype)).sum())
    return torch.stack(parts).sum()


def compare(ours: list[Tensor], reference: list[Tensor], eager: list[Tensor], backward: bool) -> list[ErrorReport]:
    """Error reports; gradients are compared relative to their largest entry, whatever the loss's scale."""
    reports = []
    for a, b, c in zip(ours, reference, eager, strict=True):
        size = b.abs().max().item() if backward else 1.0
        # A gradient that is zero in exact arithmetic (a key bias's) is rounding in all three.
        size = size if size > 1e-9 else 1.0
        reports.append(measure_error("output", a / size, b / size, c / size, backward=backward))
    return reports


def workload(system: System, dtype: torch.dtype, train: bool, facts: dict[str, Any]) -> Workload:
    torch.manual_seed(0)
    model, inputs = system.build()
    inputs = cast(inputs, dtype)
    model = model.eval().to(dtype)
    fast = twin(model)
    report = accelerate(fast, loss=True, exact=False)

    def run(m: nn.Module) -> Callable[[], object]:
        def forward() -> object:
            with torch.no_grad():
                return m(**inputs)

        def step() -> None:
            loss(system, m, inputs).backward()
            m.zero_grad(set_to_none=True)

        return step if train else forward

    def check() -> str:
        some = first(system, inputs)
        with torch.set_grad_enabled(train):
            results = gradients if train else outputs
            # Forward results of the whole batch are what is timed; gradients are those of the part.
            given = some if train else inputs
            ours, eager = (results(system, m, given) for m in (fast, model))
            with widened(model, system.lean) as wide:
                reference = results(system, wide, cast(some, torch.float64))
        if not train and system.checked is not None:
            ours, eager = ([x[: system.checked] for x in given] for given in (ours, eager))
        reports = compare(ours, reference, eager, train)
        worst = max(reports, key=lambda r: r.max_error / max(r.max_budget, 1e-30))
        name = f"{str(dtype).removeprefix('torch.')} {'forward+backward' if train else 'forward'}"
        share, seconds = attention_share(model, run(model))
        facts.setdefault(system.name, {})[name] = {
            "error": worst.max_error,
            "budget": worst.max_budget,
            "share": share,
            "seconds": seconds,
            "device": device_name(),
            "swapped": sorted({f"{s.module.rpartition('.')[2]}" for s in report.swapped}),
        }
        return "ok" if all(r.same_nonfinite and r.max_error <= r.max_budget for r in reports) else str(worst)

    return Workload({"sdpa": run(model), "fastxattn": run(fast)}, "sdpa", check)


def table(facts: dict[str, Any]) -> str:
    """The table, one row per measured system, dtype and pass, and where they were measured."""
    records = read_csv(CSV) if CSV.exists() else []
    sdpa = {(r.case, r.direction, r.dtype, r.threads, r.device): r for r in records if r.provider == "sdpa"}
    lines = [
        "| system | swapped classes | pass | dtype | machine | original ms | ms | speed-up | error | in attention "
        "| bound by |",
        "|---|---|---|---|---|---:|---:|---:|---:|---:|---|",
    ]
    places = set()
    for system in SYSTEMS:
        for r in (r for r in records if r.provider == "fastxattn" and r.case == system.name):
            fact = facts[r.case][f"{r.dtype} {r.direction}"]
            rival = sdpa[r.case, r.direction, r.dtype, r.threads, r.device]
            machine = short_device(r.device) + (", 1 thread (processor time)" if r.threads == 1 else "")
            here = fact["device"] == r.device  # the machine that error and share were taken on
            error, share = (f"{fact['error']:.1e}", f"{fact['share']:.0%}") if here else ("", "")
            speed = f"{r.ratio:.2f}x" if r.gate == "ok" else "outside its error budget"
            places.add((r.device, r.versions))
            lines.append(
                f"| {r.case} | {', '.join(fact['swapped'])} | {r.direction} | {r.dtype} | {machine} "
                f"| {rival.median_ms:.3g} | {r.median_ms:.3g} | {speed} | {error} | {share} "
                f"| {system.note} |"
            )
    measured = [f"\nMeasured on {device}; {versions}." for device, versions in sorted(places)]
    return "\n".join([*lines, *measured]) + "\n"


def write_document(facts: dict[str, Any]) -> None:
    text = DOC.read_text() if DOC.exists() else "<!-- table -->\n<!-- /table -->\n"
    before, _, rest = text.partition("<!-- table -->")
    after = rest.partition("<!-- /table -->")[2]
    DOC.write_text(f"{before}<!-- table -->\n{table(facts)}<!-- /table -->{after}")


def rows(match: str, dtypes: set[str], missing: bool, stalest: bool = False) -> Iterator[Row]:
    """The rows to measure; with ``stalest`` those first that are missing, then those measured longest ago.

    Float32 comes before either: see :func:`benchmarks.harness.run_cases`.
    """
    threads = torch.get_num_threads()
    found = read_csv(CSV) if CSV.exists() else []  # what was measured last is written last
    age = {(r.case, r.direction, r.dtype, r.threads): place for place, r in enumerate(found)}

    def place(row: Row) -> tuple[bool, int]:
        return row[1] is not torch.float32, age.get((*_named(row), threads), -1) if stalest else 0

    wanted = sorted(_rows(match, dtypes), key=place)
    yield from (row for row in wanted if not missing or (*_named(row), threads) not in age)


def _named(row: Row) -> tuple[str, str, str]:
    system, dtype, direction = row
    return system.name, direction, str(dtype).removeprefix("torch.")


def _rows(match: str, dtypes: set[str]) -> Iterator[Row]:
    for system in SYSTEMS:
        for dtype in system.dtypes:
            name = str(dtype).removeprefix("torch.")
            for direction in ("forward", "forward+backward") if system.train else ("forward",):
                if re.search(match, f"{system.name} {direction} {name}") and name in dtypes:
                    yield system, dtype, direction


def clock() -> Callable[[], float]:
    """On one thread, processor time: other work on the machine does not inflate it."""
    return time.process_time if torch.get_num_threads() == 1 else time.perf_counter


def measure(row: Row, facts: dict[str, Any], seconds: float) -> list[Record]:
    """One row: as many interleaved rounds as fill ``seconds``, 3 to 15."""
    system, dtype, direction = row
    work = workload(system, dtype, direction != "forward", facts)
    verdict = work.check()
    once = facts[system.name][f"{str(dtype).removeprefix('torch.')} {direction}"].pop("seconds")
    rounds = min(15, max(3, round(seconds / (2 * once))))
    checked = Workload(work.providers, work.rival, lambda: verdict)
    return run_case(Case("models", system.name, direction, dtype, lambda: checked), rounds=rounds, clock=clock())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--match", default="", help="only rows (system, pass, dtype) that match this expression")
    parser.add_argument("--dtypes", default="float32,bfloat16", help="comma-separated")
    parser.add_argument("--missing", action="store_true", help="only rows that the CSV does not have yet")
    parser.add_argument("--stalest", action="store_true", help="missing rows first, then the oldest")
    parser.add_argument("--minutes", type=float, default=1e9, help="begin no row after this long")
    parser.add_argument("--seconds", type=float, default=40, help="timed per row, in 3 to 15 interleaved rounds")
    parser.add_argument("--threads", type=int, default=2, help="1: processor time is measured")
    parser.add_argument("--list", action="store_true", help="name the rows, and measure nothing")
    parser.add_argument("--table", action="store_true", help="only rewrite docs/guide/models.md")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    facts = json.loads(FACTS.read_text()) if FACTS.exists() else {}
    until = min(time.time() + 60 * options.minutes, float(os.environ.get("FASTXATTN_BENCH_UNTIL", "inf")))
    wanted = list(rows(options.match, set(options.dtypes.split(",")), options.missing, options.stalest))
    if options.list:
        print(*("; ".join(_named(row)) for row in wanted), sep="\n")
    pending = Pending(" ".join(_named(row)) for row in wanted)
    for row in wanted:
        title = " ".join(_named(row))
        if options.table or options.list or time.time() > until:
            break
        try:
            records = measure(row, facts, options.seconds)
        except Exception:  # the other rows can still be measured
            print(f"{title}: failed", traceback.format_exc(), sep="\n", flush=True)
            continue
        finally:
            gc.collect()
        pending.done(title)
        for r in records:
            print(
                f"{r.case} {r.direction} {r.dtype} {r.provider}: {r.median_ms:.4g} ms {r.ratio:.2f}x {r.gate}",
                flush=True,
            )
        write_csv(CSV, records)
        FACTS.write_text(json.dumps(facts, indent=1, sort_keys=True) + "\n")
    if not options.list:
        write_document(facts)


if __name__ == "__main__":
    main()
