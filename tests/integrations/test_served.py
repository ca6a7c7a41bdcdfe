"""The table of docs/guide/models.md that says which attention calls are served: every row is run."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks import served
from benchmarks.served import BUILDERS
from fastxattn.integrations import accelerate, core

every = pytest.mark.parametrize("name", BUILDERS)
DOCUMENTED = served.DOC.read_text().partition(served.MARKS[0])[2].partition(served.MARKS[1])[0].strip().splitlines()


@every
def test_a_row_says_what_runs(name: str) -> None:
    row = served.run(name)
    assert row.difference < 2e-5
    assert str(row) in DOCUMENTED, "run python -m benchmarks.served --write"
    assert (row.served > 0) == ("falls back" not in str(row))
    if row.served == 0:
        assert row.report.left, "a model that falls back says why"


def test_the_table_has_no_other_rows() -> None:
    assert len(DOCUMENTED) == len(BUILDERS) + 2


def gradients(model: nn.Module, inputs: dict[str, Any]) -> dict[str, Tensor]:
    loss = sum(t.sin().sum() for t in served.outputs(model, inputs) if t.requires_grad and t.isfinite().all())
    assert isinstance(loss, Tensor)
    loss.backward()
    return {key: p.grad for key, p in model.named_parameters() if p.grad is not None}


@every
def test_gradients(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(core, "SMALL", 0)
    model, inputs = served.build(name)
    fast = copy.deepcopy(model)
    accelerate(fast)
    expected, ours = gradients(model, inputs), gradients(fast, inputs)
    assert expected.keys() == ours.keys()
    for key, grad in expected.items():
        scale = max(grad.abs().max().item(), 1.0)
        assert (ours[key] - grad).abs().max() < 2e-4 * scale, key


def maps(output: Any, prefix: str = "") -> dict[str, Any]:
    """Every field of attention maps in an output and in those inside it."""
    found: dict[str, Any] = {}
    for key, value in output.items():
        if "attentions" in key:
            found[prefix + key] = value
        elif hasattr(value, "items"):
            found |= maps(value, f"{prefix}{key}.")
    return found


# ColPali's original is bidirectional with sdpa, which has no maps, and causal with eager. CLIPSeg's decoder and
# Kosmos-2's projection give maps in one of the implementations only.
OTHER = {"ColPali": {"attentions"}, "Kosmos-2": {"projection_attentions"}, "CLIPSeg": {"decoder_output.attentions"}}


def leaves(value: Any) -> list[Tensor]:
    return [t for t in torch.utils._pytree.tree_leaves(value) if t is not None]


@every
def test_attention_maps(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the original's, or as eager's where the original's implementation has none."""
    monkeypatch.setattr(core, "SMALL", 0)
    model, inputs = served.build(name)
    fast, eager = copy.deepcopy(model), copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    accelerate(fast)
    results = []
    for each in (model, eager, fast):
        torch.manual_seed(1)
        with torch.no_grad():
            results.append(maps(each(**inputs, output_attentions=True)))
    original, slow, ours = results
    for key in slow.keys() - OTHER.get(name, set()):
        theirs, mine = leaves(original.get(key)) or leaves(slow[key]), leaves(ours.get(key))
        assert len(mine) == len(theirs), key
        for a, b in zip(mine, theirs, strict=True):
            assert a.shape == b.shape, key
            assert (a - b).abs().max() < 1e-4, key
