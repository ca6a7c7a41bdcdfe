"""Kept keys and values, and remembered masks, notice every change of what determines them."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from doubles import MaskedCrossAttention
from torch import Tensor, nn
from torch.nn.utils import parametrize
from zoo import idefics

from fastxattn.integrations import accelerate, core, kept, register_adapter
from fastxattn.integrations.masks import recognise

register_adapter(MaskedCrossAttention, "fastxattn.integrations.flamingo:MaskedCrossAttention")


@pytest.fixture(autouse=True)
def _even_the_smallest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(core, "SMALL", 0)
    torch.manual_seed(0)


class LoRA(nn.Module):
    """Low-rank adapters around a linear layer, as peft's: switched by attributes, merged through ``.data``."""

    def __init__(self, base: nn.Linear, names: tuple[str, ...] = ("one", "two")) -> None:
        super().__init__()
        self.base_layer, self.active, self.merged = base, names[0], False
        self.delta = nn.ParameterDict({n: nn.Parameter(torch.randn_like(base.weight) * 0.3) for n in names})

    def forward(self, x: Tensor) -> Tensor:
        out = self.base_layer(x)
        return out if self.merged or not self.active else out + x @ self.delta[self.active].T

    def merge(self) -> None:
        self.base_layer.weight.data += self.delta[self.active]
        self.merged = True


class LoRALinear(nn.Linear):
    """loralib's form: the adapter is in the layer itself."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * getattr(self, "factor", 1.0)


class Doubled(nn.Module):
    on = True

    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight if self.on else weight


def models() -> tuple[nn.Module, nn.Module, dict[str, Any]]:
    """IDEFICS, accelerated and not, with the same weights."""
    model, inputs, _ = idefics(False)
    model.eval()
    for p in model.parameters():
        if p.ndim > 1:
            nn.init.normal_(p, std=p.shape[-1] ** -0.5)
    return model, copy.deepcopy(model), inputs


def crossings(model: nn.Module) -> list[Any]:
    return [layer.cross_attn for layer in model.model.gated_cross_attn_layers]  # type: ignore[union-attr]


def wrap(*both: nn.Module) -> None:
    torch.manual_seed(5)
    deltas = {}
    for model in both:
        for i, cross in enumerate(crossings(model)):
            for name in ("k_proj", "v_proj"):
                layer = LoRA(getattr(cross, name))
                layer.load_state_dict(deltas.setdefault((i, name), layer.state_dict()))
                setattr(cross, name, layer)


def agree(model: nn.Module, fast: nn.Module, inputs: dict[str, Any]) -> None:
    with torch.no_grad():
        for _ in range(2):
            expected = model(**inputs).logits
            torch.testing.assert_close(fast(**inputs).logits, expected, atol=2e-5, rtol=1e-4)


def for_each(change: Callable[[Any], None]) -> Callable[[nn.Module], None]:
    def run(model: nn.Module) -> None:
        for cross in crossings(model):
            change(cross)

    return run


def scaled_data(cross: Any) -> None:
    cross.v_proj.weight.data.mul_(-1)  # as EMA does


def one_number(cross: Any) -> None:
    cross.k_proj.weight.data[3, 5] += 1.0


def swapped_rows(cross: Any) -> None:
    cross.v_proj.weight.data[[0, 1]] = cross.v_proj.weight.data[[1, 0]].clone()


def through_numpy(cross: Any) -> None:
    cross.v_proj.weight.detach().numpy()[:] *= 0.5


def replaced(cross: Any) -> None:
    torch.manual_seed(2)
    cross.v_proj = nn.Linear(cross.v_proj.in_features, cross.v_proj.out_features, bias=False)


def replaced_parameter(cross: Any) -> None:
    cross.k_proj.weight = nn.Parameter(cross.k_proj.weight.detach() * 0.7)


def loaded(cross: Any) -> None:
    cross.load_state_dict({k: v * 0.6 for k, v in cross.state_dict().items()})


def assigned(cross: Any) -> None:
    cross.load_state_dict({k: v * 0.6 for k, v in cross.state_dict().items()}, assign=True)


def parametrized(cross: Any) -> None:
    parametrize.register_parametrization(cross.v_proj, "weight", Doubled())


def subclassed(cross: Any) -> None:
    cross.v_proj.__class__ = LoRALinear
    cross.v_proj.factor = 0.5


def hooked(cross: Any) -> None:
    cross.v_proj.register_forward_hook(lambda module, args, out: out * 0.5)


CHANGES = [
    scaled_data,
    one_number,
    swapped_rows,
    through_numpy,
    replaced,
    replaced_parameter,
    loaded,
    assigned,
    parametrized,
    subclassed,
    hooked,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
def test_other_weights_are_noticed(change: Callable[[Any], None]) -> None:
    model, fast, inputs = models()
    accelerate(fast)
    agree(model, fast, inputs)
    assert all(cross in kept._kept for cross in crossings(fast))
    for both in (model, fast):
        for_each(change)(both)
    agree(model, fast, inputs)


def test_what_switches_by_an_attribute_is_not_kept() -> None:
    model, fast, inputs = models()
    wrap(model, fast)
    accelerate(fast)
    agree(model, fast, inputs)
    switches: list[Callable[[Any], None]] = [
        lambda layer: setattr(layer, "active", "two"),
        lambda layer: setattr(layer, "active", ""),
        lambda layer: setattr(layer, "active", "one"),
        LoRA.merge,
    ]
    for switch in switches:
        for both in (model, fast):
            for layer in both.modules():
                if isinstance(layer, LoRA):
                    switch(layer)
        agree(model, fast, inputs)
    for change in (parametrized, subclassed):
        model, fast, inputs = models()
        for_each(change)(model), for_each(change)(fast)
        accelerate(fast)
        agree(model, fast, inputs)
        for both in (model, fast):
            for module in both.modules():
                if isinstance(module, Doubled):
                    module.on = False
                if isinstance(module, LoRALinear):
                    module.factor = 3.0  # type: ignore[assignment]
        agree(model, fast, inputs)


@pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="peft is not installed")
def test_peft_adapters() -> None:
    from peft import LoraConfig, get_peft_model

    model, _, inputs = models()
    options = LoraConfig(r=4, target_modules=["k_proj", "v_proj"], init_lora_weights=False)
    wrapped = get_peft_model(model, options).eval()
    wrapped.add_adapter("other", options)
    fast = copy.deepcopy(wrapped)
    accelerate(fast)
    agree(wrapped, fast, inputs)
    with wrapped.disable_adapter(), fast.disable_adapter():
        agree(wrapped, fast, inputs)
    for change in ("set_adapter", "merge_adapter", "unmerge_adapter"):
        for both in (wrapped, fast):
            getattr(both, change)(*["other"] * (change == "set_adapter"))
        agree(wrapped, fast, inputs)
    agree(wrapped.merge_and_unload(), fast.merge_and_unload(), inputs)


@contextmanager
def inference(on: bool) -> Iterator[None]:
    with torch.inference_mode(on):
        yield


@pytest.mark.parametrize("loaded_under", [False, True])
@pytest.mark.parametrize("run_under", [False, True])
def test_inference_mode(loaded_under: bool, run_under: bool) -> None:
    with inference(loaded_under):
        model, fast, inputs = models()
        accelerate(fast)
    with inference(run_under):
        agree(model, fast, inputs)
    with torch.no_grad():
        agree(model, fast, inputs)
        for both in (model, fast):
            with inference(loaded_under):
                for_each(scaled_data)(both)
        agree(model, fast, inputs)


def test_features_refilled_in_place_are_noticed() -> None:
    module = MaskedCrossAttention(64, 48).eval()
    twin = copy.deepcopy(module)
    accelerate(module)
    x, media = torch.randn(2, 6, 64), torch.randn(2, 2, 5, 48)
    refills: list[Callable[[], Any]] = [
        lambda: None,
        lambda: media.data.copy_(torch.randn(2, 2, 5, 48)),
        lambda: media.numpy().__setitem__(0, 3.0),
        lambda: media.mul_(0.5),
    ]
    with torch.no_grad():
        for refill in refills:
            refill()
            torch.testing.assert_close(module(x, media), twin(x, media), atol=1e-5, rtol=1e-4)
        assert module in kept._kept
        kept.forget(module)
        assert module not in kept._kept


def test_layers_share_one_copy_of_the_features() -> None:
    _, fast, inputs = models()
    accelerate(fast)
    with torch.no_grad():
        fast(**inputs)
    assert len({id(kept._kept[cross].states) for cross in crossings(fast)}) == 1


REFILLS: dict[str, Callable[[Tensor], Any]] = {
    "in place": lambda mask: mask.logical_not_() if mask.dtype == torch.bool else mask.neg_(),
    "data": lambda mask: mask.data.copy_(mask.flip(-1)),
    "numpy": lambda mask: mask.numpy().__setitem__(..., mask.flip(-1).numpy()),
}


@pytest.mark.parametrize("refill", REFILLS)
@pytest.mark.parametrize("kind", ["keys", "ranges", "bias"])
def test_masks_refilled_in_place_are_recognised_anew(refill: str, kind: str) -> None:
    mask = (
        torch.ones(2, 1, 6, 6).tril().bool() if kind == "ranges" else (torch.arange(6) < 4).expand(2, 1, 6, 6).clone()
    )
    if kind == "bias":
        mask = torch.randn(2, 1, 6, 6)
    before = recognise(mask, 2, 6, 6)
    assert recognise(mask, 2, 6, 6) is before
    REFILLS[refill](mask)
    found, fresh = recognise(mask, 2, 6, 6), recognise(mask.clone(), 2, 6, 6)
    assert found is not before
    for name in ("keys", "ranges", "bias"):
        a, b = getattr(found, name), getattr(fresh, name)
        assert (a is None) == (b is None)
        assert a is None or torch.equal(a, b)


def test_idefics_masks_refilled_through_data() -> None:
    model, fast, inputs = models()
    accelerate(fast)
    agree(model, fast, inputs)
    mask = inputs["image_attention_mask"]
    mask.numpy()[:, :, 0] = 0
    mask[..., -1].data.fill_(1)
    agree(model, fast, inputs)


def test_masks_met_in_inference_mode_serve_training_later() -> None:
    mask, query = torch.ones(6, 6).tril().bool().expand(2, 1, 6, 6).clone(), torch.randn(2, 6, 64, requires_grad=True)
    layer = nn.MultiheadAttention(64, 4, batch_first=True)
    accelerate(layer)
    hidden = ~mask[0, 0]
    with torch.inference_mode():
        recognise(mask, 2, 6, 6)
        layer(query, query, query, attn_mask=hidden, need_weights=False)
    layer(query, query, query, attn_mask=hidden, need_weights=False)[0].sum().backward()
    visible = recognise(mask, 2, 6, 6)
    assert visible.ranges is not None
    assert not visible.ranges.is_inference()
