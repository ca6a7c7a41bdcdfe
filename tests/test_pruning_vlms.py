"""prune_model() on vision-language models of many families: each prunes, or is refused by name."""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch

import fastxattn
from fastxattn.integrations.pruning import prune_model
from fastxattn.ops.pruning import Budget

transformers = pytest.importorskip("transformers")
from tests.pruning_families import FAMILIES, TEXT, VISION, build  # noqa: E402

FROM_VISION = ("llava", "internvl", "gemma3", "paligemma")
"""Families whose vision attention is that of their image tokens."""


@pytest.mark.parametrize("at", [0, 1, 3])
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_prunes_by_default_and_restores(name: str, at: int) -> None:
    model, inputs = build(name)
    with torch.no_grad():
        before = model(**inputs).logits
        with prune_model(model, keep=0.5, at=at) as pruning:
            after = model(**inputs).logits
            kept, total = pruning.last.rows, int(pruning.last.source_cu_seqlens[-1])
            assert total / 2 <= kept < total and after.shape == before.shape and after.isfinite().all()
            assert not torch.allclose(after[:, -1], before[:, -1], rtol=1e-4, atol=1e-4)
        for strategy in ("auto", "divprune"):
            with prune_model(model, keep=1.0, strategy=strategy, at=at):
                torch.testing.assert_close(model(**inputs).logits, before, rtol=1e-3, atol=1e-4)
        assert torch.equal(model(**inputs).logits, before)


@pytest.mark.parametrize("at", [0, 2])
@pytest.mark.parametrize("name", FAMILIES)
def test_decoding_from_the_pruned_cache_equals_one_pass(name: str, at: int) -> None:
    """Three tokens one by one, then two at once: positions, M-RoPE and windows are those of the full prompt."""
    model, inputs = build(name)
    kind = next((k for k in ("mm_token_type_ids", "token_type_ids") if k in inputs), None)
    prompt, new = inputs["input_ids"], torch.tensor([[20, 31, 42, 53, 64]])
    with torch.no_grad(), prune_model(model, keep=0.5, strategy="uniform", at=at):
        whole = {**inputs, "input_ids": torch.cat([prompt, new], 1)}
        whole["attention_mask"] = torch.ones_like(whole["input_ids"])
        if kind is not None:
            whole[kind] = torch.cat([inputs[kind], torch.zeros_like(new, dtype=inputs[kind].dtype)], 1)
        if name != "paligemma":  # whose prompt is bidirectional: more text changes it
            want = model(**whole).logits[:, -5:]
        first = model(**inputs, use_cache=True)
        cache, length = first.past_key_values, prompt.shape[1]
        assert cache.get_seq_length() == length
        pieces = []
        for start, stop in ((0, 1), (1, 2), (2, 3), (3, 5)):
            step = {"input_ids": new[:, start:stop], "attention_mask": torch.ones(1, length + stop, dtype=torch.long)}
            if "qwen" in name:  # which takes masks of the new tokens only here
                del step["attention_mask"]
            pieces.append(model(**step, past_key_values=cache, use_cache=True).logits)
    if name != "paligemma":
        torch.testing.assert_close(torch.cat(pieces, 1), want, rtol=1e-3, atol=1e-4)


def padded(inputs: dict[str, Any], left: int, right: int) -> dict[str, Any]:
    pad = lambda t: torch.nn.functional.pad(t, (left, right))  # noqa: E731
    return {k: pad(v) if v.ndim == 2 and k.endswith(("ids", "mask")) else v for k, v in inputs.items()}


@pytest.mark.parametrize("name", ["llava", "qwen2_vl", "qwen3_vl", "internvl", "gemma3"])
@pytest.mark.parametrize(("strategy", "at"), [("attention", 2), ("attention", 3), ("norm", 0)])
def test_padding_and_neighbours_do_not_change_what_is_kept(name: str, strategy: str, at: int) -> None:
    model, inputs = build(name)
    length = inputs["input_ids"].shape[1]
    with torch.no_grad(), prune_model(model, keep=0.5, strategy=strategy, at=at) as pruning:
        alone = model(**inputs).logits
        want = pruning.last.keep_index.tolist()
        for left, right in ((5, 0), (0, 5), (2, 3)):
            logits = model(**padded(inputs, left, right)).logits[:, left : left + length]
            assert pruning.last.keep_index.tolist() == want
            torch.testing.assert_close(logits[:, -1], alone[:, -1], rtol=1e-3, atol=1e-4)
            one, other = padded(inputs, left, right), padded(inputs, 5 - left, 5 - right)
            other["input_ids"] = torch.where(other["input_ids"] == 10, 77, other["input_ids"])
            logits = model(**{k: torch.cat([v, other[k]]) for k, v in one.items()}).logits
            assert pruning.last.keep_index[: len(want)].tolist() == want
            torch.testing.assert_close(logits[:1, left + length - 1], alone[:, -1], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["llava", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "internvl", "gemma3"])
def test_text_attention_is_the_models_own(name: str) -> None:
    """The kept tokens are those that the last row of the layer's attention map ranks first."""
    model, inputs = build(name)
    model.set_attn_implementation("eager")
    images = inputs["input_ids"][0] == 98
    with torch.no_grad():
        maps = model(**inputs, output_attentions=True).attentions
        for at in (1, 2):
            with prune_model(model, keep=0.5, strategy="attention", at=at) as pruning:
                model(**inputs)
            scores = maps[at - 1][0, :, -1].mean(0)[images]
            torch.testing.assert_close(pruning.last.scores, scores, rtol=1e-3, atol=1e-5)


def test_scores_of_merged_patches_follow_the_tokens() -> None:
    """InternVL makes a token of 2 x 2 patches, Gemma 3 of a pooled square: its score is their mean."""
    for name, side in (("internvl", 4), ("gemma3", 2)):
        model, inputs = build(name)
        model.set_attn_implementation("eager")
        with torch.no_grad():
            tower = model.model.vision_tower(inputs["pixel_values"], output_attentions=True).attentions[-1]
            with prune_model(model, keep=0.5, strategy="attention") as pruning:
                model(**inputs)
        patches = tower[:, :, 0, 1:].mean(1) if name == "internvl" else tower.mean((1, 2))
        square = int(patches.shape[1] ** 0.5)
        want = torch.nn.functional.adaptive_avg_pool2d(patches.view(-1, 1, square, square), side).flatten()
        torch.testing.assert_close(pruning.last.scores, want, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("name", FAMILIES)
def test_attention_before_the_language_model_works_or_is_refused_by_name(name: str) -> None:
    model, inputs = build(name)
    if name not in FROM_VISION:
        core = type(model.model).__name__
        with pytest.raises(ValueError, match=f"strategy must not need attention at layer 0 of {core}"):
            prune_model(model, keep=0.5, strategy="attention")
        return
    with torch.no_grad(), prune_model(model, keep=0.5, strategy="attention") as pruning:
        model(**inputs)
    assert pruning.last.scores.shape[0] == (inputs["input_ids"] == 98).sum()


def test_llava_of_an_encoder_without_cls_drops_its_first_patch() -> None:
    """As the model does under vision_feature_select_strategy="default"."""
    t = transformers
    text = t.LlamaConfig(**TEXT)
    config = t.LlavaConfig(vision_config=t.SiglipVisionConfig(**VISION), text_config=text, image_token_id=98)
    model = t.LlavaForConditionalGeneration(config).eval()
    ids = torch.tensor([[1, *[98] * 15, 7, 8]])
    with torch.no_grad(), prune_model(model, keep=0.2, strategy="attention") as pruning:
        model(input_ids=ids, pixel_values=torch.randn(1, 3, 32, 32))
    assert pruning.last.cu_seqlens.tolist() == [0, 3]


@pytest.mark.parametrize("at", [0, 2])
@pytest.mark.parametrize("name", ["llava", "qwen3_vl", "gemma3"])
def test_inputs_embeds_are_pruned_as_input_ids_are(name: str, at: int) -> None:
    model, inputs = build(name)
    with torch.no_grad(), prune_model(model, keep=0.25, at=at) as pruning:
        want, kept = model(**inputs).logits, pruning.last.keep_index.tolist()
        ids = inputs.pop("input_ids")
        if name == "qwen3_vl":  # which makes M-RoPE positions of ids only
            inputs["position_ids"] = model.model.get_rope_index(ids, **inputs)[0]
        got = model(inputs_embeds=model.get_input_embeddings()(ids), **inputs).logits
    assert pruning.last.keep_index.tolist() == kept
    torch.testing.assert_close(got, want)


def test_models_that_cannot_prune_are_refused_by_name() -> None:
    t = transformers
    text = {**TEXT, "cross_attention_layers": [1], "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
    vision = {**VISION, "num_global_layers": 1, "attention_heads": 4, "vision_output_dim": 64, "max_num_tiles": 1}
    vision |= {"intermediate_layers_indices": [1], "supported_aspect_ratios": [[1, 1]]}
    mllama = t.MllamaForConditionalGeneration(t.MllamaConfig(text_config=text, vision_config=vision)).eval()
    with pytest.raises(ValueError, match=r"model must .*MllamaModel"):
        prune_model(mllama, keep=0.5)
    with pytest.raises(ValueError, match=r"model must .*LlamaModel"):
        prune_model(transformers.LlamaModel(transformers.LlamaConfig(**TEXT)), keep=0.5)
    assert not hooks(mllama)


def hooks(model: Any) -> list[Any]:
    """Hooks of prunings, wherever they are."""
    every = [h for m in model.modules() for h in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())]
    return [h for h in every if type(getattr(h, "__self__", None)).__module__.startswith("fastxattn")]


def test_blip2_prunes_before_its_qformer() -> None:
    t = transformers
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = t.OPTConfig(hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=32)
    config = t.Blip2Config(
        vision_config=VISION, qformer_config={**small, "encoder_hidden_size": 32}, text_config=text.to_dict()
    )
    model = t.Blip2ForConditionalGeneration(config).eval()
    with torch.no_grad(), prune_model(model, keep=0.5) as pruning:
        model.get_image_features(torch.randn(1, 3, 32, 32))
    assert pruning.last.cu_seqlens.tolist() == [0, 9]
    with pytest.raises(ValueError, match=r"attention scores need Blip2Attention\.q_proj"):
        prune_model(model, keep=0.5, strategy="attention")


@pytest.mark.parametrize(("strategy", "at"), [("attention", 0), ("divprune", 0), ("attention", 2)])
def test_threads_prune_apart(strategy: str, at: int) -> None:
    model, first = build("llava")
    requests = [{**first, "pixel_values": torch.randn(1, 3, 32, 32)} for _ in range(4)]
    wrong: list[Any] = []

    def serve(request: dict[str, Any], want: torch.Tensor) -> None:
        for _ in range(10):
            try:
                with torch.no_grad():
                    torch.testing.assert_close(model(**request).logits, want)
            except Exception as error:
                wrong.append(error)

    with torch.no_grad(), prune_model(model, keep=0.5, strategy=strategy, at=at):
        work = [(r, model(**r).logits) for r in requests]
        threads = [threading.Thread(target=serve, args=w) for w in work]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong, wrong[0]


def test_threads_prune_an_encoder_apart() -> None:
    model = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**VISION)).eval()
    images = [torch.randn(1, 3, 32, 32) for _ in range(4)]
    wrong: list[Any] = []

    def serve(image: torch.Tensor, want: torch.Tensor) -> None:
        for _ in range(10):
            try:
                with torch.no_grad():
                    torch.testing.assert_close(model(image).last_hidden_state, want)
            except Exception as error:
                wrong.append(error)

    for strategy in ("attention", "tome"):
        with torch.no_grad(), prune_model(model, keep=0.5, strategy=strategy, at=[1, 2]):
            work = [(i, model(i).last_hidden_state) for i in images]
            threads = [threading.Thread(target=serve, args=w) for w in work]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
    assert not wrong, wrong[0]


@pytest.mark.parametrize("at", [0, 2])
def test_a_copy_owns_its_pruning(at: int) -> None:
    model, inputs = build("llava")
    with torch.no_grad():
        plain = model(**inputs).logits
        handle = prune_model(model, keep=0.5, at=at)
        pruned = model(**inputs).logits
        copied = copy.deepcopy(model)
        for parameter in model.parameters():
            parameter.zero_()
        torch.testing.assert_close(copied(**inputs).logits, pruned)
        assert handle.last is not None
        handle.restore()
        torch.testing.assert_close(copied(**inputs).logits, pruned)  # restored on its own
        with pytest.raises(ValueError, match="model must not be pruned already"):
            prune_model(copied, keep=0.5)
        fastxattn.restore(copied)
        torch.testing.assert_close(copied(**inputs).logits, plain)
    assert not hooks(model) and not hooks(copied)
    assert "get_image_features" not in vars(copied.model)


def test_a_copied_encoder_owns_its_pruning() -> None:
    model = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**VISION)).eval()
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        plain = model(pixels).last_hidden_state
        handle = prune_model(model, keep=0.5, strategy="attention", at=[1, 2])
        pruned = model(pixels).last_hidden_state
        copied = copy.deepcopy(model)
        handle.restore()
        torch.testing.assert_close(model(pixels).last_hidden_state, plain)
        torch.testing.assert_close(copied(pixels).last_hidden_state, pruned)
        fastxattn.restore(copied)
        torch.testing.assert_close(copied(pixels).last_hidden_state, plain)


def test_unequal_padded_prompts_keep_every_layer_right() -> None:
    """Batch of two with unequal numbers of images, pruned inside: decoding equals each prompt alone."""
    model, one = build("llava")
    two = {**one, "input_ids": torch.tensor([[1, *[98] * 16, 6, *[98] * 16, 7, 8]])}
    two["pixel_values"] = torch.randn(2, 3, 32, 32)
    width, length = two["input_ids"].shape[1], one["input_ids"].shape[1]
    two["attention_mask"] = torch.ones_like(two["input_ids"])
    both = {k: torch.cat([v, two[k]]) for k, v in padded(one, width - length, 0).items()}
    step = torch.tensor([[20], [21]])
    for at in (0, 1, 3):
        with torch.no_grad(), prune_model(model, keep=Budget.count(5), at=at):
            caches = [model(**r, use_cache=True).past_key_values for r in (one, two, both)]
            widths = [layer.keys.shape[2] for layer in caches[2].layers]
            assert widths == [width] * at + [width - 22] * (4 - at)
            masks = [torch.ones(1, n + 1, dtype=torch.long) for n in (length, width)]
            masks.append(torch.nn.functional.pad(both["attention_mask"], (0, 1), value=1))
            alone, other, got = (
                model(input_ids=i, attention_mask=m, past_key_values=c).logits[:, -1]
                for i, m, c in zip((step[:1], step[1:], step), masks, caches, strict=True)
            )
        torch.testing.assert_close(got, torch.cat([alone, other]), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("strategy", "at"), [("divprune", 0), ("attention", 2), ("prumerge", 2)])
def test_gradients_are_the_same_under_checkpointing(strategy: str, at: int) -> None:
    model, inputs = build("llava")
    model.train()
    found = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        with prune_model(model, keep=0.5, strategy=strategy, at=at):
            model(**inputs, use_cache=False).logits[:, -1].logsumexp(-1).sum().backward()
        found.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert len(found[0]) > 40
    for plain, checkpointed in zip(*found, strict=True):
        torch.testing.assert_close(plain, checkpointed)
