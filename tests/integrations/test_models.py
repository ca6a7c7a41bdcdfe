"""Every system that accelerate() knows: the same numbers, whatever lies in the padding, forward and backward."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from zoo import ENTRIES, Entry
from zoo_detection import ENTRIES as MORE

import fastxattn.nn.projected as projected
import fastxattn.ops.attention.api as attention_api
from fastxattn.integrations import Report, accelerate, core, restore, status
from fastxattn.ops.attention.problem import Problem
from fastxattn.testing import measure_error

both = pytest.mark.parametrize("entry", ENTRIES + MORE, ids=lambda e: e.name)


@pytest.fixture(autouse=True)
def _even_the_smallest(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small models run the swapped paths too."""
    monkeypatch.setattr(core, "SMALL", 0)
    torch.manual_seed(0)


def test_the_table_of_models_holds_every_measured_system_and_no_other() -> None:
    """docs/guide/models.md and the registry that ``benchmarks.bench_models`` measures."""
    from benchmarks.bench_models import DOC, SYSTEMS

    table = DOC.read_text().partition("<!-- table -->")[2].partition("<!-- /table -->")[0]
    rows = [line.split("|")[1].strip() for line in table.splitlines() if line.startswith("| ")][1:]
    assert set(rows) == {system.name for system in SYSTEMS}


def build(entry: Entry) -> tuple[nn.Module, dict[str, Any], dict[str, Any]]:
    model, inputs, garbage = entry.build()
    return model.eval(), inputs, garbage


def wide(inputs: dict[str, Any]) -> dict[str, Any]:
    return {k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in inputs.items()}


def run(entry: Entry, model: nn.Module, inputs: dict[str, Any]) -> list[Tensor]:
    torch.manual_seed(1)  # ViLT samples patches
    return entry.keep(model(**inputs))


def within(entry: Entry, model: nn.Module, inputs: dict[str, Any]) -> tuple[bool, str]:
    """Whether the accelerated ``model`` keeps the error budget against its own float64 original."""
    original = copy.deepcopy(model)
    restore(original)
    with torch.no_grad():
        eager = run(entry, original, inputs)
        reference = run(entry, copy.deepcopy(original).double(), wide(inputs))
        ours = run(entry, model, inputs)
    reports = [measure_error(entry.name, *three) for three in zip(ours, reference, eager, strict=True)]
    # A layer's rounding is amplified by those after it: allow the mean what the maximum is allowed.
    return all(r.same_nonfinite and r.max_error <= r.max_budget + 2e-6 for r in reports), "; ".join(map(str, reports))


@both
def test_same_numbers_as_the_original(entry: Entry) -> None:
    model, inputs, _ = build(entry)
    report: Report = accelerate(model, exact=entry.exact)
    swapped = {swap.adapter.rpartition(".")[2] for swap in report.swapped}
    assert set(entry.swaps) <= swapped, str(report)
    ok, text = within(entry, model, inputs)
    assert ok, text


@both
def test_padding_changes_nothing(entry: Entry) -> None:
    model, inputs, garbage = build(entry)
    accelerate(model, exact=entry.exact)
    with torch.no_grad():
        for a, b in zip(run(entry, model, inputs), run(entry, model, garbage), strict=True):
            assert torch.equal(a, b)


def one_sequence(offsets: Tensor, rows: int) -> Tensor:
    return torch.tensor([0, rows] + [rows] * (offsets.numel() - 2), dtype=torch.int32)


@pytest.fixture
def blind_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels that let every query see every key there is."""
    attend, context = attention_api.run, projected.absorbed_attention

    def blind_attend(problem: Problem, backend: str) -> Any:
        if problem.bias is None:  # a bias is indexed by a token's place in its sequence
            q, k = problem.cu_seqlens_q, problem.cu_seqlens_k
            q, k = one_sequence(q, len(problem.query)), one_sequence(k, len(problem.key))
            problem = problem.replace(cu_seqlens_q=q, cu_seqlens_k=k)
        limits = "seqused_q", "seqused_k", "query_index", "key_index", "kv_range"
        return attend(problem.replace(**dict.fromkeys(limits)), backend)

    def blind_context(q: Tensor, x: Tensor, cu_q: Tensor, cu_k: Tensor, *rest: Any, **options: Any) -> Any:
        cu_q, cu_k = one_sequence(cu_q, len(q)), one_sequence(cu_k, len(x))
        return context(q, x, cu_q, cu_k, len(q), len(x), **{**options, "kv_range": None})

    monkeypatch.setattr(attention_api, "run", blind_attend)
    monkeypatch.setattr(projected, "absorbed_attention", blind_context)


@both
@pytest.mark.usefixtures("blind_kernels")
def test_a_kernel_that_ignores_masks_is_noticed(entry: Entry) -> None:
    model, inputs, _ = build(entry)
    accelerate(model, exact=entry.exact)
    assert not within(entry, model, inputs)[0]


@both
def test_gradients(entry: Entry) -> None:
    model, inputs, _ = build(entry)

    def gradients(model: nn.Module, inputs: dict[str, Any]) -> dict[str, Tensor]:
        loss = sum(
            (x * torch.linspace(-1, 1, x.numel(), dtype=x.dtype).view_as(x)).sum() for x in run(entry, model, inputs)
        )
        model.zero_grad()
        loss.backward()  # type: ignore[union-attr]
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    eager = gradients(model, inputs)
    reference = gradients(copy.deepcopy(model).double(), wide(inputs))
    accelerate(model, exact=entry.exact)
    ours = gradients(model, inputs)
    for name, exact in reference.items():
        scale = exact.abs().max().item()
        theirs = (eager[name].double() - exact).abs().max().item()
        mine = (ours.get(name, torch.zeros_like(eager[name])).double() - exact).abs().max().item()
        assert mine <= 3 * theirs + 2e-5 * scale + 2e-5, f"{name}: {mine:.3g} against {theirs:.3g}, scale {scale:.3g}"


@both
def test_round_trip(entry: Entry) -> None:
    model, inputs, _ = build(entry)
    keys, text, kinds = list(model.state_dict()), repr(model), [type(m) for m in model.modules()]
    with torch.no_grad():
        before = run(entry, model, inputs)
        first = accelerate(model, exact=entry.exact)
        swapped = run(entry, model, inputs)
        assert list(model.state_dict()) == keys
        assert repr(model) == text
        assert not accelerate(model, exact=entry.exact)  # swapped twice: nothing left to do
        assert len(status(model).swapped) == len(first.swapped)
        assert restore(model) == len(first.swapped)
        assert [type(m) for m in model.modules()] == kinds
        for a, b in zip(before, run(entry, model, inputs), strict=True):
            assert torch.equal(a, b)
        again = accelerate(model, exact=entry.exact)
        assert [s.name for s in again.swapped] == [s.name for s in first.swapped]
        for a, b in zip(swapped, run(entry, model, inputs), strict=True):
            assert torch.equal(a, b)
