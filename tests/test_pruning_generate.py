"""Generation with pruned models: every mode gives the tokens that plain decoding gives, or is refused by name."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from fastxattn.integrations.pruning import prune_model
from fastxattn.ops.pruning import Budget

transformers = pytest.importorskip("transformers")
from tests.pruning_families import build  # noqa: E402

GREEDY = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
SETTINGS = [("auto", 0), ("uniform", 0), ("uniform", 2), ("attention", 2)]
TYPES = ("mm_token_type_ids", "token_type_ids")


def batch(name: str) -> tuple[Any, dict[str, Any]]:
    """Two prompts, the first with padding on the left."""
    model, inputs = build(name)
    both = {}
    for key, value in inputs.items():
        if value.ndim == 2 and key.endswith(("ids", "mask")):
            one, two = (torch.nn.functional.pad(value, p) for p in ((3, 0), (0, 3)))
            if key == "input_ids":
                two[:, -3:] = torch.tensor([33, 34, 35])
            elif key == "attention_mask":
                two = torch.ones_like(two)
            both[key] = torch.cat([one, two])
        else:
            both[key] = torch.cat([value, value + 0.5 if value.is_floating_point() else value])
    return model, both


def new(model: Any, inputs: dict[str, Any], **options: Any) -> list[list[int]]:
    ids: torch.Tensor = model.generate(**inputs, **(GREEDY | options))
    return ids[:, inputs["input_ids"].shape[1] :].tolist()


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "qwen3_vl", "internvl", "gemma3"])
@pytest.mark.parametrize(("strategy", "at"), SETTINGS)
def test_modes_that_decode_greedily_agree(name: str, strategy: str, at: int) -> None:
    model, inputs = batch(name)
    with torch.no_grad(), prune_model(model, keep=0.5, strategy=strategy, at=at):
        plain = new(model, inputs)
        assert len({tuple(row) for row in plain}) == 2
        assert new(model, inputs, cache_implementation="static") == plain
        assert new(model, inputs, cache_implementation="static") == plain  # the cache that was used before, reset
        if strategy != "attention":  # which ranks by the last token, and without a cache that is the newest
            assert new(model, inputs, use_cache=False) == plain
        three = new(model, inputs, do_sample=True, top_k=1, num_return_sequences=3)
        assert three == [row for row in plain for _ in range(3)]
        half = [{k: v[: len(v) // 2] for k, v in inputs.items()}, {k: v[len(v) // 2 :] for k, v in inputs.items()}]
        assert [new(model, part)[0] for part in half] == plain


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "qwen3_vl", "gemma3"])
@pytest.mark.parametrize(("strategy", "at"), SETTINGS)
def test_beams_equal_beams_on_a_hidden_prompt(name: str, strategy: str, at: int) -> None:
    """Beam search of two prompts equals that of each; with use_cache=False it reads everything anew."""
    model, inputs = batch(name)
    half = [{k: v[: len(v) // 2] for k, v in inputs.items()}, {k: v[len(v) // 2 :] for k, v in inputs.items()}]
    with torch.no_grad(), prune_model(model, keep=0.5, strategy=strategy, at=at):
        beams = new(model, inputs, num_beams=3)
        assert [new(model, part, num_beams=3)[0] for part in half] == beams
        if strategy != "attention":
            assert new(model, inputs, num_beams=3, use_cache=False) == beams


@pytest.mark.parametrize("name", ["llava", "qwen3_vl", "gemma3"])
@pytest.mark.parametrize(("strategy", "at"), SETTINGS)
def test_assisted_decoding_equals_plain_decoding(name: str, strategy: str, at: int) -> None:
    model, inputs = build(name)
    with torch.no_grad(), prune_model(model, keep=0.5, strategy=strategy, at=at):
        plain = new(model, inputs, max_new_tokens=9)
        assert new(model, inputs, max_new_tokens=9, prompt_lookup_num_tokens=2) == plain
        if name == "llava" and strategy != "attention":  # whose last token is the assistant's last guess
            assistant = copy.deepcopy(model)
            assert new(model, inputs, max_new_tokens=9, assistant_model=assistant) == plain


@pytest.mark.parametrize(("strategy", "at"), SETTINGS)
@pytest.mark.parametrize("name", ["llava", "qwen2_vl", "gemma3"])
def test_text_only_prompts_are_those_of_the_model(name: str, strategy: str, at: int) -> None:
    model, inputs = build(name)
    text = {"input_ids": torch.tensor([[1, 5, 7, 9]])}
    with torch.no_grad():
        want = new(model, text)
        with prune_model(model, keep=0.5, strategy=strategy, at=at):
            assert new(model, text) == want
            new(model, inputs)
            assert new(model, text) == want


@pytest.mark.parametrize("name", ["llava", "gemma3", "internvl"])
@pytest.mark.parametrize("at", [0, 2])
def test_second_turns_on_one_cache(name: str, at: int) -> None:
    """A turn of text, then one with images, equals one prompt of everything where the strategy looks at images only."""
    model, inputs = build(name)
    types = next((k for k in TYPES if k in inputs), None)
    ids, images = inputs["input_ids"], inputs["pixel_values"]
    with torch.no_grad(), prune_model(model, keep=0.5, strategy="uniform", at=at) as pruning:
        first = model.generate(**inputs, **GREEDY, return_dict_in_generate=True)
        turn = torch.cat([first.sequences, torch.tensor([[20, 21, 22]])], 1)

        def whole(ids: torch.Tensor, count: int) -> dict[str, Any]:
            every = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            if types is not None:
                every[types] = (ids == 98).long()
            return every | {"pixel_values": torch.cat([images] * count)}

        text = {k: v for k, v in whole(turn, 1).items() if k != "pixel_values"}
        second = model.generate(**text, **GREEDY, past_key_values=first.past_key_values, return_dict_in_generate=True)
        assert second.sequences[:, turn.shape[1] :].tolist() == new(model, whole(turn, 1))
        # Images again, by a forward pass: generate's own second turn with images takes features of all of them.
        cache, more = second.past_key_values, torch.cat([torch.tensor([[30]]), ids[:, 1:]], 1)
        read = cache.get_seq_length()
        third = torch.cat([second.sequences[:, :read], more], 1)
        step = {"input_ids": more, "attention_mask": torch.ones_like(third), "pixel_values": images}
        if types is not None:
            step[types] = (third == 98).long()
        got = model(**step, past_key_values=cache, use_cache=True).logits[:, -1]
        assert pruning.last is not None
        want = model(**whole(third, 2)).logits[:, -1]
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)
        assert cache.get_seq_length() == third.shape[1]
        after = model(input_ids=torch.tensor([[40]]), past_key_values=cache).logits[:, -1]
        want = model(**whole(torch.cat([third, torch.tensor([[40]])], 1), 2)).logits[:, -1]
        torch.testing.assert_close(after, want, rtol=1e-3, atol=1e-4)


def test_prefill_in_chunks_prunes_each_chunk_or_names_itself() -> None:
    model, inputs = build("llava")
    ids = torch.cat([inputs["input_ids"], torch.tensor([[31, 32, 33]])], 1)  # 2 + 16 + 6 tokens, chunks of 6
    inputs |= {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with torch.no_grad():
        for strategy in ("auto", "divprune", "norm"):
            with prune_model(model, keep=0.5, strategy=strategy):
                out = model.generate(**inputs, **GREEDY, prefill_chunk_size=6, return_dict_in_generate=True)
            assert out.past_key_values.layers[0].keys.shape[2] == ids.shape[1] - 8 + 5
        with prune_model(model, keep=1.0, strategy="attention"):
            assert new(model, inputs, prefill_chunk_size=6) == new(model, inputs)
        with prune_model(model, keep=0.5, at=2), pytest.raises(ValueError, match="without prefill_chunk_size"):
            new(model, inputs, prefill_chunk_size=6)


def test_copies_and_crops_of_pruned_caches() -> None:
    """A prompt's cache is copied for every question, and cannot be cropped into the pruned part."""
    model, inputs = build("llava")

    def step(cache: Any, token: int) -> torch.Tensor:
        logits: torch.Tensor = model(input_ids=torch.tensor([[token]]), past_key_values=cache).logits
        return logits

    with torch.no_grad(), prune_model(model, keep=Budget.count(4)):
        cache = model(**inputs, use_cache=True).past_key_values
        length = cache.get_seq_length()
        other = copy.deepcopy(cache)
        want = step(cache, 20)
        torch.testing.assert_close(step(other, 20), want)
        step(other, 30)
        other.crop(-2)
        assert other.get_seq_length() == length
        torch.testing.assert_close(step(other, 20), want)
        other.crop(-4)  # the last words of the prompt
        assert other.get_seq_length() == length - 3
        words = inputs["input_ids"][:, -3:]
        model(input_ids=words, past_key_values=other)
        torch.testing.assert_close(step(other, 20), want)
        with pytest.raises(ValueError, match="cropped by the tokens after the last image"):
            other.crop(-14)
        other.batch_repeat_interleave(2)
        two = model(input_ids=torch.tensor([[21], [21]]), past_key_values=other).logits
        torch.testing.assert_close(two[:1], two[1:])
        assert repr(cache.layers[0]) == "DynamicLayer"
