"""QFormer against Hugging Face's: queries alone, with text, text alone, ragged images, cached keys and values."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from fastxattn import PackedTokens
from fastxattn.nn import QFormer
from fastxattn.testing.parity import compare

transformers = pytest.importorskip("transformers")
BATCH, COUNT, LT, LI, HIDDEN, WIDTH = 3, 4, 5, 9, 32, 24
LENGTHS = [9, 4, 1]
IMAGE_MASK = torch.arange(LI) < torch.tensor(LENGTHS)[:, None]
TEXT_MASK = torch.arange(LT) < torch.tensor([2, 5, 1])[:, None]
ABSORB = pytest.mark.parametrize("absorb", ["on", "off", "auto"])
SIZES: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "encoder_hidden_size": WIDTH,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}


def _random(module: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.1)
    return module.eval()


def _blip2(text: bool) -> Any:
    config = transformers.Blip2QFormerConfig(use_qformer_text_input=text, **SIZES)
    config._attn_implementation = "eager"
    return _random(transformers.Blip2QFormerModel(config))


def _instructblip() -> Any:
    config = transformers.InstructBlipQFormerConfig(vocab_size=50, max_position_embeddings=16, **SIZES)
    config._attn_implementation = "eager"
    return _random(transformers.models.instructblip.modeling_instructblip.InstructBlipQFormerModel(config))


@ABSORB
def test_queries_over_ragged_images(absorb: Any) -> None:
    original = _blip2(text=False)
    ours = QFormer.from_hf(original, absorb)
    assert list(ours.state_dict()) == list(original.state_dict())
    assert {p.data_ptr() for p in ours.parameters()} == {p.data_ptr() for p in original.parameters()}

    def run_original(m: Any, xs: list[torch.Tensor]) -> list[torch.Tensor]:
        queries, image = xs[0].expand(BATCH, -1, -1), xs[1]
        out = m(query_embeds=queries, encoder_hidden_states=image, encoder_attention_mask=IMAGE_MASK.long())
        return [out.last_hidden_state]

    def run_ours(m: Any, xs: list[torch.Tensor]) -> list[torch.Tensor]:
        return [m(xs[0], xs[1], context_mask=IMAGE_MASK)[0]]

    compare(ours, original, [torch.randn(1, COUNT, HIDDEN), torch.randn(BATCH, LI, WIDTH)], run_ours, run_original)


@ABSORB
def test_queries_and_text(absorb: Any) -> None:
    original = _blip2(text=True)
    ours = QFormer.from_hf(original, absorb)

    def run_original(m: Any, xs: list[torch.Tensor]) -> list[torch.Tensor]:
        joint, outs = torch.cat(xs[:2], 1), []
        mask = torch.cat([torch.ones(BATCH, COUNT), TEXT_MASK], 1).long()
        for b, n in enumerate(LENGTHS):  # its image mask does not fit queries with text
            image = xs[2][b : b + 1, :n]
            one = m(
                query_embeds=joint[b : b + 1],
                query_length=COUNT,
                attention_mask=mask[b : b + 1],
                encoder_hidden_states=image,
            )
            outs.append(one.last_hidden_state)
        out = torch.cat(outs)
        return [out[:, :COUNT], out[:, COUNT:] * TEXT_MASK[..., None]]

    def run_ours(m: Any, xs: list[torch.Tensor]) -> list[torch.Tensor]:
        return list(m(xs[0], xs[2], context_mask=IMAGE_MASK, text=xs[1], text_mask=TEXT_MASK))

    inputs = [torch.randn(BATCH, COUNT, HIDDEN), torch.randn(BATCH, LT, HIDDEN), torch.randn(BATCH, LI, WIDTH)]
    compare(ours, original, inputs, run_ours, run_original)


def test_text_alone() -> None:
    original = _blip2(text=True)
    ours = QFormer.from_hf(original)
    text = torch.randn(BATCH, LT, HIDDEN)
    with torch.no_grad():
        expected = original(query_embeds=text, query_length=0, attention_mask=TEXT_MASK.long()).last_hidden_state
        queries, states = ours(None, text=text, text_mask=TEXT_MASK)
    assert queries is None
    torch.testing.assert_close(states[TEXT_MASK], expected[TEXT_MASK], rtol=1e-4, atol=1e-5)


def test_instructblip_with_token_ids_and_cached_images() -> None:
    original = _instructblip()
    ours = QFormer.from_hf(original)
    assert list(ours.state_dict()) == list(original.state_dict())
    ids, queries = torch.randint(1, 50, (BATCH, LT)), torch.randn(BATCH, COUNT, HIDDEN)
    image = torch.randn(BATCH, LI, WIDTH)
    mask = torch.cat([torch.ones(BATCH, COUNT), TEXT_MASK], 1).long()
    with torch.no_grad():
        expected = original(
            input_ids=ids,
            attention_mask=mask,
            query_embeds=queries,
            encoder_hidden_states=image,
            encoder_attention_mask=IMAGE_MASK.long(),
        ).last_hidden_state
        out, text = ours(queries, image, context_mask=IMAGE_MASK, input_ids=ids, text_mask=TEXT_MASK)
        kv = ours.precompute_kv(image, context_mask=IMAGE_MASK)
        cached, _ = ours(queries, context_kv=kv, input_ids=ids, text_mask=TEXT_MASK)
    torch.testing.assert_close(out, expected[:, :COUNT], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(text[TEXT_MASK], expected[:, COUNT:][TEXT_MASK], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(cached, out, rtol=1e-4, atol=1e-5)


@ABSORB
def test_packed_is_padded_and_nan_in_padding_changes_nothing(absorb: Any) -> None:
    ours = QFormer.from_hf(_blip2(text=True), absorb)
    queries, text, image = (torch.randn(BATCH, n, w) for n, w in ((COUNT, HIDDEN), (LT, HIDDEN), (LI, WIDTH)))
    out, states = ours(queries, image, context_mask=IMAGE_MASK, text=text, text_mask=TEXT_MASK)
    packed_text = PackedTokens.from_padded(text, TEXT_MASK)
    again, packed = ours(queries, PackedTokens.from_padded(image, IMAGE_MASK), text=packed_text)
    assert torch.equal(again, out)
    assert torch.equal(packed.values, states[TEXT_MASK])
    dirty_image = torch.where(IMAGE_MASK[..., None], image, torch.nan)
    dirty_text = torch.where(TEXT_MASK[..., None], text, torch.inf)
    dirty = ours(queries, dirty_image, context_mask=IMAGE_MASK, text=dirty_text, text_mask=TEXT_MASK)
    assert torch.equal(dirty[0], out)
    assert torch.equal(dirty[1], states)
    dirty[0].sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in ours.parameters())


def test_a_sequence_does_not_depend_on_its_neighbours() -> None:
    ours = QFormer.from_hf(_blip2(text=False))
    queries, image = torch.randn(BATCH, COUNT, HIDDEN), torch.randn(BATCH, LI, WIDTH)
    with torch.no_grad():
        whole = ours(queries, image, context_mask=IMAGE_MASK)[0]
        alone = ours(queries[1:2], image[1:2, :4])[0]
    torch.testing.assert_close(whole[1:2], alone, rtol=1e-5, atol=1e-6)


def test_refusals() -> None:
    ours = QFormer.from_hf(_blip2(text=False))
    queries, image = torch.randn(BATCH, COUNT, HIDDEN), torch.randn(BATCH, LI, WIDTH)
    with pytest.raises(ValueError, match="context must be given"):
        ours(queries)
    with pytest.raises(ValueError, match="batch size 1 or 3"):
        ours(queries[:2], image)
    with pytest.raises(ValueError, match="without a vocabulary"):
        ours(queries, image, input_ids=torch.zeros(BATCH, 2, dtype=torch.long))
    with pytest.raises(ValueError, match="queries must be given"):
        ours(None, image)
    with pytest.raises(ValueError, match="one entry per layer"):
        ours(queries, context_kv=ours.precompute_kv(image)[:1])
