"""Accelerated models under gradient checkpointing, with attention maps and without: gradients as without it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import fastxattn

transformers = pytest.importorskip("transformers")
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
TEXT = {**SIZES, "vocab_size": 50, "max_position_embeddings": 48, "bos_token_id": 1, "eos_token_id": 2}
VISION = {**SIZES, "image_size": 32, "patch_size": 8}


def tokens() -> dict[str, Any]:
    return {"input_ids": torch.randint(3, 49, (3, 40), generator=torch.Generator().manual_seed(1))}


def pixels() -> dict[str, Any]:
    return {"pixel_values": torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))}


MODELS = {
    "SiglipTextModel": (lambda: transformers.SiglipTextModel(transformers.SiglipTextConfig(**TEXT)), tokens),
    "CLIPTextModel": (lambda: transformers.CLIPTextModel(transformers.CLIPTextConfig(**TEXT)), tokens),
    "BertModel": (lambda: transformers.BertModel(transformers.BertConfig(**TEXT)), tokens),
    "SiglipVisionModel": (lambda: transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**VISION)), pixels),
    "BlipVisionModel": (lambda: transformers.BlipVisionModel(transformers.BlipVisionConfig(**VISION)), pixels),
}


def gradients(model: torch.nn.Module, inputs: dict[str, Any], maps: bool, through_maps: bool) -> list[torch.Tensor]:
    model.zero_grad()
    result = model(**inputs, output_attentions=maps)
    loss = result.last_hidden_state.sin().sum()
    if maps:
        assert all(m is not None for m in result.attentions)
    if maps and through_maps:
        loss = loss + sum(m.square().sum() for m in result.attentions)
    loss.backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("reentrant", [False, True], ids=["", "reentrant"])
@pytest.mark.parametrize("maps", [False, True], ids=["", "maps"])
@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_those_without_checkpointing(name: str, maps: bool, reentrant: bool) -> None:
    torch.manual_seed(0)
    build, made = MODELS[name]
    model = build().train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    fastxattn.accelerate(model)
    inputs = made()
    # What a hook collects inside a reentrant checkpoint has no graph, in any model.
    expected = gradients(model, inputs, maps, not reentrant)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    found = gradients(model, inputs, maps, not reentrant)
    assert len(found) == len(expected)
    for ours, plain in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-6)
