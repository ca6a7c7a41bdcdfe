"""The options of accelerate(), and what an accelerated model still does when asked for more than its result."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from zoo import ENTRIES, Entry, qformer, torch_decoder
from zoo_detection import ENTRIES as MORE

from fastxattn.integrations import Adapter, accelerate, accelerated, core, register_adapter, restore, status, verify


@pytest.fixture(autouse=True)
def _even_the_smallest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(core, "SMALL", 0)
    torch.manual_seed(0)


class Positional(nn.Module):
    """A model that is called with positional arguments, and that has a training mode."""

    def __init__(self) -> None:
        super().__init__()
        self.decoder, self.inputs, _ = torch_decoder()
        self.dropout = nn.Dropout(0.5)

    def forward(self, target: Tensor, memory: Tensor, hidden: Tensor) -> Tensor:
        return self.dropout(self.decoder(target, memory, hidden))


def test_verify_takes_positional_arguments_and_leaves_modes_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify, "SLOWER", 0.0)
    model = Positional()
    model.decoder.decoder.eval()
    modes = [m.training for m in model.modules()]
    state = torch.get_rng_state()
    report = accelerate(model, verify=tuple(model.inputs.values()))
    assert report.verification is not None
    assert report.verification.kept, str(report)
    assert "verified: error" in str(report)
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)


def test_verify_that_raises_leaves_nothing_swapped() -> None:
    model, inputs, _ = qformer()
    kinds = [type(m) for m in model.modules()]
    with pytest.raises(AttributeError, match="shape"):
        accelerate(model, verify={**inputs, "query_embeds": "not a tensor"})
    assert [type(m) for m in model.modules()] == kinds
    assert not status(model)


def test_verify_refuses_what_it_cannot_run() -> None:
    model, inputs, _ = qformer()
    with pytest.raises(ValueError, match="verify must be a dict"):
        accelerate(model, verify=inputs["query_embeds"])
    with pytest.raises(ValueError, match="cannot be used with dry_run"):
        accelerate(model, verify=inputs, dry_run=True)
    assert not status(model)


def test_verify_undoes_only_its_own_swap(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs, _ = qformer()
    accelerate(model, include="encoder")
    monkeypatch.setattr(verify, "SLOWER", 1e9)
    report = accelerate(model, verify=inputs)
    assert report.left
    assert [s.name for s in status(model).swapped] == ["encoder"]


class Scaler(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return 2 * x, x.sum()


class FastScaler(Adapter):
    does = "leaves out the sum"
    exact = False

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return x + x, None


def test_inexact_adapters_need_permission() -> None:
    register_adapter(Scaler, FastScaler)
    model = nn.ModuleList([Scaler()])
    report = accelerate(model)
    assert not report
    assert "pass exact=False" in report.left[0].reason
    with pytest.raises(RuntimeError, match="leaves out the sum"):
        accelerate(model, strict=True)
    assert accelerate(model, exact=False, strict=True)
    assert model[0](torch.ones(1))[1] is None
    assert restore(model) == 1


def test_adapters_by_name_are_imported_when_met_and_attention_without_one_is_listed() -> None:
    class OddAttention(nn.Module):
        pass

    model = nn.ModuleList([OddAttention(), OddAttention()])
    report = accelerate(model)
    name = f"{OddAttention.__module__}.{OddAttention.__qualname__}"
    assert report.unknown == {name: 2}
    assert "no adapter: 2 x OddAttention" in str(report)
    register_adapter(name, f"{__name__}:FastScaler")
    assert not accelerate(model).unknown
    with pytest.raises(TypeError, match=r"subclass of torch\.nn\.Module"):
        register_adapter(int, FastScaler)  # type: ignore[arg-type]


def test_accelerated_takes_the_same_options() -> None:
    model = qformer()[0]
    model.eval()
    with accelerated(model, include="encoder", dry_run=True) as report:
        assert report.dry_run
        assert not status(model)
    with accelerated(model, exclude="encoder*") as report:
        assert all(not s.name.startswith("encoder") for s in report.swapped)
    assert not status(model)


def test_a_model_on_several_devices_keeps_them() -> None:
    model = qformer()[0]
    model.encoder.layer[1].to("meta")
    devices = {n: p.device for n, p in model.named_parameters()}
    assert accelerate(model)
    assert {n: p.device for n, p in model.named_parameters()} == devices
    layer = model.encoder.layer[0].crossattention.attention
    states = torch.randn(2, 3, 64)
    out = layer(states, None, torch.randn(2, 5, 80), None)[0]
    assert out.device.type == "cpu"
    assert out.shape == states.shape


def test_data_parallel_around_an_accelerated_model(tmp_path: Path) -> None:
    import torch.distributed as dist

    model, inputs, _ = qformer()
    model.eval()
    twin = copy.deepcopy(model)
    dist.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        accelerate(model)
        wrapped = nn.parallel.DistributedDataParallel(model)
        for m in (wrapped, twin):
            m(**inputs).last_hidden_state.square().sum().backward()
        for (name, a), b in zip(model.named_parameters(), twin.parameters(), strict=True):
            assert (a.grad is None) == (b.grad is None), name
            if a.grad is not None:
                torch.testing.assert_close(a.grad, b.grad, atol=1e-4, rtol=1e-3)
        assert restore(wrapped) > 0
    finally:
        dist.destroy_process_group()


MAPS = (
    "blip2-qformer",
    "instructblip-qformer",
    "clip-text-masked",
    "blip-itm",
    "whisper",
    "t5",
    "lxmert",
    "perceiver",
    "vilt",
    "flava-text",
    "albef-style-bert",
    "table-transformer",
)


@pytest.mark.parametrize("entry", [e for e in ENTRIES + MORE if e.name in MAPS], ids=lambda e: e.name)
def test_attention_maps_are_the_originals(entry: Entry) -> None:
    model, inputs, _ = entry.build()
    model.eval()
    if hasattr(model, "set_attn_implementation"):
        model.set_attn_implementation("eager")  # sdpa has none to give

    def maps() -> list[Tensor]:
        torch.manual_seed(1)
        with torch.no_grad():
            out = model(**inputs, output_attentions=True)
        found: Any = [value for name, value in out.items() if "attentions" in name]
        return [t for group in found for t in torch.utils._pytree.tree_leaves(group) if isinstance(t, Tensor)]

    expected = maps()
    assert expected
    accelerate(model)
    for a, b in zip(maps(), expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
