"""nn.TokenPruner, and prune_model() on real Hugging Face classes with random weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import fastxattn
from fastxattn.integrations.pruning import prune_model
from fastxattn.nn.pruner import TokenPruner
from fastxattn.ops.pruning import STRATEGIES, Budget
from fastxattn.packed import PackedTokens

transformers = pytest.importorskip("transformers")
SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}
VISION = {**SMALL, "image_size": 32, "patch_size": 8}


def test_token_pruner_is_differentiable_and_packed() -> None:
    torch.manual_seed(0)
    pruner = TokenPruner(0.5, "divprune", protected=1)
    x = torch.randn(2, 10, 8, requires_grad=True)
    fewer, kept = pruner(x)
    assert isinstance(fewer, PackedTokens) and fewer.lengths.tolist() == [5, 5]
    assert {0, 10} <= set(kept.keep_index.tolist())
    fewer.values.sum().backward()
    assert x.grad is not None and x.grad.sum() == 80
    assert "divprune" in repr(pruner)


def test_learned_scores_train_straight_through() -> None:
    torch.manual_seed(0)
    pruner = TokenPruner(Budget.count(3), learned=True, width=4)
    x = torch.randn(1, 8, 4)
    fewer, kept = pruner(x)
    assert torch.equal(fewer.values, x[0, kept.keep_index.long()])  # forward: exactly the kept rows
    fewer.values.square().sum().backward()
    assert pruner.scorer is not None and pruner.scorer.weight.grad.abs().sum() > 0
    with pytest.raises(ValueError, match="width must be given"):
        TokenPruner(0.5, learned=True)
    with pytest.raises(ValueError, match="strategy must be one of"):
        TokenPruner(0.5, "nonsense")
    with pytest.raises(TypeError, match=r"needs must be empty for a learned pruner.*got \['attention'\]"):
        pruner(x, attention=torch.rand(8))
    with pytest.raises(ValueError, match=r"tokens must be \(batch, length, channels\).*got shape \(8, 4\)"):
        TokenPruner(0.5)(x[0])


def encoder(name: str) -> Any:
    torch.manual_seed(0)
    t = transformers
    if name == "clip":
        return t.CLIPVisionModel(t.CLIPVisionConfig(**VISION)).eval()
    if name == "siglip":
        return t.SiglipVisionModel(t.SiglipVisionConfig(**VISION)).eval()
    if name == "dinov2":
        return t.Dinov2Model(t.Dinov2Config(**VISION)).eval()
    if name == "registers":
        return t.Dinov2WithRegistersModel(t.Dinov2WithRegistersConfig(**VISION, num_register_tokens=3)).eval()
    return t.ViTModel(t.ViTConfig(**VISION)).eval()


SPECIAL = {"clip": 1, "siglip": 0, "dinov2": 1, "registers": 4, "vit": 1}


@pytest.mark.parametrize("name", SPECIAL)
def test_vision_encoders_prune_and_undo(name: str) -> None:
    model, pixels = encoder(name), torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        before = model(pixels).last_hidden_state
        for strategy in STRATEGIES:
            with prune_model(model, keep=Budget.count(8), strategy=strategy, at=2) as pruning:
                after = model(pixels)
                assert pruning.last is not None
                assert after.last_hidden_state.shape[1] == 8 + SPECIAL[name] + (strategy == "evit"), strategy
                assert after.last_hidden_state.isfinite().all()
                special = [b * before.shape[1] + i for b in range(3) for i in range(SPECIAL[name])]
                assert set(special) <= set(pruning.last.keep_index.tolist())
        with prune_model(model, keep=1.0, strategy="norm"):
            torch.testing.assert_close(model(pixels).last_hidden_state, before)
        assert torch.equal(model(pixels).last_hidden_state, before)  # undone


def test_an_encoder_prunes_in_stages_and_carries_sizes() -> None:
    """ToMe at three layers: every token of the image is accounted for, and undoing leaves nothing behind."""
    model, pixels = encoder("dinov2"), torch.randn(2, 3, 32, 32)
    lengths: list[int] = []
    biases: list[Any] = []

    def note(module: Any, args: Any, kwargs: Any) -> None:
        lengths.append(args[0].shape[1])
        biases.append(args[1] if len(args) > 1 else kwargs.get("attention_mask"))

    with torch.no_grad():
        before = model(pixels).last_hidden_state
        with prune_model(model, keep=0.5, strategy="tome", at=[1, 2, 3]):
            hooks = [layer.register_forward_pre_hook(note, with_kwargs=True) for layer in model.encoder.layer]
            model(pixels)
            for hook in hooks:
                hook.remove()
        assert lengths == [17, 9, 5, 3]  # CLS and 16, 8, 4, 2 patches
        for bias in biases[1:]:
            torch.testing.assert_close(bias.exp().sum(-1).flatten(), torch.full((2,), 17.0))
        with prune_model(model, keep=0.5, at=(1, 3)) as pruning:  # PyramidDrop
            assert model(pixels).last_hidden_state.shape[1] == 5
            assert pruning.last.source_cu_seqlens.tolist() == [0, 9, 18]
        assert torch.equal(model(pixels).last_hidden_state, before)


def test_pruned_models_run_on_the_fused_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """attn_implementation="fastxattn" sees fewer tokens and the sizes of merged ones, as sdpa does."""
    from fastxattn.integrations import core
    from fastxattn.integrations.transformers import register

    register()
    monkeypatch.setattr(core, "SMALL", 0)
    model, pixels = encoder("clip"), torch.randn(2, 3, 32, 32)
    llm, inputs = llava(), llava_inputs()
    with torch.no_grad():
        for strategy in ("attention", "tome", "evit", "divprune"):
            found = []
            for attention in ("sdpa", "fastxattn"):
                model.set_attn_implementation(attention)
                with prune_model(model, keep=0.5, strategy=strategy, at=[1, 3]):
                    found.append(model(pixels).last_hidden_state)
            torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)
        for at in (0, 2):
            found = []
            for attention in ("sdpa", "fastxattn"):
                llm.set_attn_implementation(attention)
                with prune_model(llm, keep=0.25, at=at):
                    found.append(llm(**inputs).logits)
            torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


def test_encoder_attention_is_the_models_own() -> None:
    """The kept patches are those the CLS token's eager attention map ranks first."""
    model, pixels = encoder("clip"), torch.randn(2, 3, 32, 32)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        maps = model(pixels, output_attentions=True).attentions
        with prune_model(model, keep=Budget.count(5), at=2) as pruning:
            model(pixels)
    want = maps[1][:, :, 0, 1:].mean(1).topk(5).indices.sort().values + 1
    assert pruning.last.keep_index.reshape(2, 6)[:, 1:].tolist() == (want + torch.tensor([[0], [17]])).tolist()


def test_gradients_flow_through_a_pruned_encoder() -> None:
    model, pixels = encoder("siglip"), torch.randn(2, 3, 32, 32)
    with prune_model(model, keep=0.5, strategy="tome"):
        model(pixels).pooler_output.sum().backward()
    grad = model.get_parameter(next(n for n, _ in model.named_parameters() if "patch_embedding" in n)).grad
    assert grad is not None and grad.isfinite().all() and grad.abs().sum() > 0


def llava(attention: str = "sdpa") -> Any:
    torch.manual_seed(0)
    t = transformers
    text = t.LlamaConfig(**SMALL, vocab_size=99, num_key_value_heads=2, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    config = t.LlavaConfig(
        vision_config=t.CLIPVisionConfig(**VISION), text_config=text, image_token_id=98, vision_feature_layer=-2
    )
    model = t.LlavaForConditionalGeneration(config).eval()
    model.set_attn_implementation(attention)
    return model


def llava_inputs() -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    image = [98] * 16
    ids = torch.tensor([[1, 5, *image, 7, 8, 9], [1, 6, *image, 10, 11, 12]])
    return {"input_ids": ids, "pixel_values": torch.randn(2, 3, 32, 32), "attention_mask": torch.ones_like(ids)}


@pytest.mark.parametrize("at", [0, 1, 2])
@pytest.mark.parametrize("strategy", ["attention", "divprune", "uniform", "prumerge"])
def test_llava_before_and_inside_the_language_model(at: int, strategy: str) -> None:
    model, inputs = llava(), llava_inputs()
    with torch.no_grad():
        before = model(**inputs).logits
        with prune_model(model, keep=Budget.count(4), strategy=strategy, at=at) as pruning:
            after = model(**inputs).logits
            assert after.shape == before.shape and pruning.last.cu_seqlens.tolist() == [0, 4, 8]
            assert not torch.allclose(after[:, -1], before[:, -1])
        with prune_model(model, keep=1.0, strategy=strategy, at=at):
            torch.testing.assert_close(model(**inputs).logits, before)
        assert torch.equal(model(**inputs).logits, before)


@pytest.mark.parametrize("at", [0, 2])
def test_llava_pruning_equals_masking_the_pruned_tokens(at: int) -> None:
    """Dropping tokens with positions kept is the same as hiding them from every later token and layer."""
    model, inputs = llava("eager"), llava_inputs()
    with torch.no_grad():
        with prune_model(model, keep=Budget.count(5), strategy="uniform", at=at) as pruning:
            got = model(**inputs).logits
        gone = torch.ones(2, 21, dtype=torch.bool)
        gone[:, :2] = gone[:, 18:] = False
        gone.view(-1)[inputs["input_ids"].flatten().eq(98).nonzero().squeeze(1)[pruning.last.keep_index.long()]] = False
        hide = torch.zeros(2, 1, 21, 21).masked_fill(
            gone[:, None, None] | ~torch.ones(21, 21, dtype=torch.bool).tril(), -1e9
        )
        hooks = [
            layer.register_forward_pre_hook(lambda m, a, k: (a, {**k, "attention_mask": hide}), with_kwargs=True)
            for layer in model.model.language_model.layers[at:]
        ]
        want = model(**inputs).logits
        for hook in hooks:
            hook.remove()
    torch.testing.assert_close(got[:, 18:], want[:, 18:], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("at", [0, 2])
def test_llava_generates_with_its_cache(at: int) -> None:
    """Decoding token by token from the pruned cache gives what one pruned forward pass over everything gives."""
    model, inputs = llava(), llava_inputs()
    with torch.no_grad(), prune_model(model, keep=Budget.count(4), strategy="uniform", at=at):
        ids = model.generate(**inputs, max_new_tokens=4, do_sample=False, min_new_tokens=4)
        assert ids.shape == (2, 25)
        mask = torch.ones_like(ids)
        logits = model(input_ids=ids[:, :-1], pixel_values=inputs["pixel_values"], attention_mask=mask[:, :-1]).logits
        logits[..., 2] = -torch.inf  # min_new_tokens forbids the end
        assert torch.equal(logits[:, 20:].argmax(-1), ids[:, 21:])


def test_llava_with_unequal_numbers_of_images() -> None:
    model = llava()
    image = [98] * 16
    ids = torch.tensor([[1, *image, 5, *image, 6], [0] * 17 + [1, *image, 7]])
    mask = (ids != 0).long()
    pixels = torch.randn(3, 3, 32, 32)
    with torch.no_grad(), prune_model(model, keep=Budget.count(3), strategy="norm") as pruning:
        both = model(input_ids=ids, attention_mask=mask, pixel_values=pixels).logits
        assert pruning.last.cu_seqlens.tolist() == [0, 3, 6, 9]
        one = model(input_ids=ids[:1], attention_mask=mask[:1], pixel_values=pixels[:2]).logits
    torch.testing.assert_close(both[0, -1], one[0, -1], rtol=1e-4, atol=1e-5)


def qwen() -> Any:
    torch.manual_seed(0)
    t = transformers
    vision = {"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "patch_size": 4, "mlp_ratio": 2}
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
    text = {**SMALL, "num_key_value_heads": 2, "vocab_size": 99, "rope_parameters": rope, "bos_token_id": 1}
    text |= {"eos_token_id": 2, "pad_token_id": 0}
    ids = {"image_token_id": 98, "video_token_id": 97, "vision_start_token_id": 96, "vision_end_token_id": 95}
    return t.Qwen2VLForConditionalGeneration(t.Qwen2VLConfig(text_config=text, vision_config=vision, **ids)).eval()


def qwen_inputs() -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    grid = torch.tensor([[1, 4, 4], [1, 8, 4]])  # 4 and 8 tokens after merging 2 x 2
    ids = torch.tensor([[1, 96, *[98] * 4, 95, 5, 6, 96, *[98] * 8, 95, 7, 8]])
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.randn(48, 3 * 2 * 4 * 4),
        "image_grid_thw": grid,
        "mm_token_type_ids": (ids == 98).int(),
    }


@pytest.mark.parametrize(("at", "strategy"), [(0, "divprune"), (0, "norm"), (2, "attention"), (1, "cdpruner")])
def test_qwen2_vl_with_images_of_two_sizes(at: int, strategy: str) -> None:
    model, inputs = qwen(), qwen_inputs()
    with torch.no_grad():
        before = model(**inputs).logits
        with prune_model(model, keep=0.5, strategy=strategy, at=at) as pruning:
            after = model(**inputs).logits
            assert pruning.last.cu_seqlens.tolist() == [0, 2, 6] and after.shape == before.shape
            ids = model.generate(**inputs, max_new_tokens=3, do_sample=False, min_new_tokens=3)
            assert ids.shape[1] == inputs["input_ids"].shape[1] + 3
        with prune_model(model, keep=1.0, strategy=strategy, at=at):
            torch.testing.assert_close(model(**inputs).logits, before)
        assert torch.equal(model(**inputs).logits, before)


@pytest.mark.parametrize("at", [0, 2])
def test_qwen2_vl_decodes_at_the_right_positions(at: int) -> None:
    model, inputs = qwen(), qwen_inputs()
    with torch.no_grad(), prune_model(model, keep=0.5, strategy="uniform", at=at):
        ids = model.generate(**inputs, max_new_tokens=3, do_sample=False, min_new_tokens=3)
        more = {**inputs, "input_ids": ids[:, :-1], "attention_mask": torch.ones_like(ids[:, :-1])}
        more["mm_token_type_ids"] = (ids[:, :-1] == 98).int()
        logits = model(**more).logits
        logits[..., 2] = -torch.inf
        assert torch.equal(logits[:, -3:].argmax(-1), ids[:, -3:])


def test_unsuitable_models_and_settings_are_refused_and_left_alone() -> None:
    model = encoder("clip")
    for kwargs, words in (
        ({"keep": 0.5, "strategy": "magic"}, "strategy must be one of"),
        ({"keep": 0.5, "at": 9}, "at must lie in"),
        ({"keep": 0.5, "at": [2, 9]}, "at must lie in"),
        ({"keep": 0.5, "at": []}, "at must name a layer"),
        ({"keep": Budget.mass(0.5)}, "keep must be a count or ratio"),
        ({"keep": 2.0}, "r must lie in"),
    ):
        with pytest.raises(ValueError, match=words):
            prune_model(model, **kwargs)
    with pytest.raises(ValueError, match="strategy must not need attention at layer 0"):
        prune_model(qwen(), keep=0.5, strategy="attention", at=0)
    with prune_model(model, keep=0.5), pytest.raises(ValueError, match="model must not be pruned already"):
        prune_model(model, keep=0.5)
    with pytest.raises(TypeError, match="at must be an int"):
        prune_model(llava(), keep=0.5, at=[1, 2])
    with pytest.raises(ValueError, match="model must be"):
        prune_model(torch.nn.Linear(2, 2), keep=0.5)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_one_idiom_restores_pruned_models() -> None:
    model, pixels = encoder("clip"), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        before = model(pixels).last_hidden_state
        handle = prune_model(model, keep=0.5, strategy="norm", at=2)
        assert model(pixels).last_hidden_state.shape[1] == 9
        handle.restore()
        handle.restore()
        assert torch.equal(model(pixels).last_hidden_state, before)
        prune_model(model, keep=0.5, strategy="norm", at=2)  # the handle need not be kept
        fastxattn.restore(model)
        assert torch.equal(model(pixels).last_hidden_state, before)
        with fastxattn.accelerated(model, exact=False, prune={"keep": 0.5, "at": 2}) as report:
            assert model(pixels).last_hidden_state.shape[1] == 9 and report.pruning is not None
        assert model(pixels).last_hidden_state.shape == before.shape
        llm, inputs = llava(), llava_inputs()
        logits = llm(**inputs).logits
        prune_model(llm, keep=0.5)
        fastxattn.restore(llm)
        assert torch.equal(llm(**inputs).logits, logits)


def test_a_pruning_that_fails_leaves_no_module_swapped() -> None:
    model = encoder("clip")
    with pytest.raises(ValueError, match="strategy must be one of"):
        fastxattn.accelerate(model, exact=False, prune={"keep": 0.5, "strategy": "magic"})
    assert not fastxattn.status(model)
    with pytest.raises(TypeError, match="kep"):
        fastxattn.accelerate(model, exact=False, prune={"kep": 0.5})
    assert not fastxattn.status(model)
    with fastxattn.prune_model(model, keep=0.5), pytest.raises(ValueError, match="model must not be pruned already"):
        fastxattn.accelerate(model, exact=False, prune={"keep": 0.5})
    assert not fastxattn.status(model)


def test_hidden_states_may_stay_short() -> None:
    model, inputs = llava(), llava_inputs()
    with torch.no_grad(), prune_model(model, keep=Budget.count(4), strategy="norm", full_length=False):
        assert model(**inputs).logits.shape[1] == 9
