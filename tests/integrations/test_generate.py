"""Generation: the same tokens, with the projections of images computed as often as they must be and no oftener."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from zoo import idefics, llava, t5, whisper

from fastxattn.integrations import accelerate, core, restore


@pytest.fixture(autouse=True)
def _even_the_smallest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(core, "SMALL", 0)
    torch.manual_seed(0)


def generate(model: nn.Module, inputs: dict[str, Any], **options: Any) -> Tensor:
    inputs = {k: v for k, v in inputs.items() if k != "decoder_input_ids"}
    return model.generate(**inputs, max_new_tokens=8, min_new_tokens=8, do_sample=False, **options)  # type: ignore


def count(projections: list[nn.Module]) -> list[int]:
    calls = [0]
    for projection in projections:
        projection.register_forward_hook(lambda *_: calls.__setitem__(0, calls[0] + 1))
    return calls


@pytest.mark.parametrize("build", [whisper, t5, llava], ids=lambda f: f.__name__)
@pytest.mark.parametrize("beams", [1, 3])
def test_same_tokens(build: Any, beams: int) -> None:
    model, inputs, _ = build()
    model.eval()
    expected = generate(model, inputs, num_beams=beams)
    assert accelerate(model)
    assert torch.equal(generate(model, inputs, num_beams=beams), expected)


@pytest.mark.parametrize("resampler", [True, False])
def test_idefics_projects_its_images_once(resampler: bool) -> None:
    model, inputs, _ = idefics(resampler)
    model.eval()
    calls = count([layer.cross_attn.k_proj for layer in model.model.gated_cross_attn_layers])
    expected = generate(model, inputs)
    assert calls == [2 * 8]  # two layers, every token
    calls[0] = 0
    accelerate(model)
    assert torch.equal(generate(model, inputs), expected)
    assert calls == [2]
    other = {**inputs, "pixel_values": inputs["pixel_values"] * 0.5}
    ours = generate(model, other)
    assert calls == [4]  # other images are projected anew
    with torch.no_grad():
        for layer in model.model.gated_cross_attn_layers:
            layer.cross_attn.v_proj.weight.mul_(1.5)
    changed = generate(model, inputs)
    assert calls == [6]  # and so are other weights
    restore(model)
    assert torch.equal(generate(model, inputs), changed)
    with torch.no_grad():
        for layer in model.model.gated_cross_attn_layers:
            layer.cross_attn.v_proj.weight.div_(1.5)
    assert torch.equal(generate(model, other), ours)


def test_idefics_keeps_nothing_in_training() -> None:
    from fastxattn.integrations import kept as module

    model, inputs, _ = idefics()
    accelerate(model)
    model.train()
    model(**inputs).logits.sum().backward()
    assert not any(layer.cross_attn in module._kept for layer in model.model.gated_cross_attn_layers)
    model.eval()
    generate(model, inputs)
    assert all(layer.cross_attn in module._kept for layer in model.model.gated_cross_attn_layers)
    module.forget(model)
    assert not any(layer.cross_attn in module._kept for layer in model.model.gated_cross_attn_layers)


@pytest.mark.parametrize("kind", ["same", "wider"])
def test_mllama_cache(kind: str) -> None:
    """Later steps read the cached tiles; tiles that nobody saw before are refused, not read as zeros."""
    from zoo import MllamaLayer, _tiles

    layer = MllamaLayer().eval()
    seen = torch.zeros(2, 6, 1, 4)
    seen[0, ..., :2] = seen[1, ..., :1] = 1
    states, hidden, step = torch.randn(2, 36, 64), torch.randn(2, 6, 64), torch.randn(2, 1, 64)
    later = seen[:, -1:].clone()
    if kind == "wider":
        later[1] = 1

    def run() -> tuple[Tensor, Tensor]:
        cache = hf.DynamicCache()
        cross = layer.model.layers[1].cross_attn
        cross.layer_idx = 0
        with torch.no_grad():
            mask = _tiles(layer, seen, 9)["cross_attention_mask"]
            first = cross(hidden, states, past_key_values=cache, attention_mask=mask)[0]
            mask = _tiles(layer, later, 9)["cross_attention_mask"]
            return first, cross(step, None, past_key_values=cache, attention_mask=mask)[0]

    expected = run()
    accelerate(layer)
    if kind == "wider":
        with pytest.raises(RuntimeError, match="no token of the first call saw"):
            run()
    else:
        for a, b in zip(run(), expected, strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
