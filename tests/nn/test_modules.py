"""Modules against their originals: outputs, gradients, padding, state_dict, packed tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from fastxattn import PackedTokens
from fastxattn.nn import (
    AttentionalPooler,
    CoAttention,
    GatedCrossAttentionBlock,
    ModalityGate,
    PerceiverResampler,
    SharedCrossAttention,
    SiglipPooler,
    TemporalCrossAttention,
    VisualProjector,
    pixel_shuffle,
)
from fastxattn.ranges import media_kv_range
from fastxattn.testing.parity import compare

pytest.importorskip("transformers")
B, LI, LT, WIDTH, HEADS = 3, 12, 5, 32, 4
ABSORB = pytest.mark.parametrize("absorb", ["on", "off"])


def _mask(lengths: list[int], size: int) -> torch.Tensor:
    return torch.arange(size) < torch.tensor(lengths)[:, None]


IMAGE_MASK, TEXT_MASK = _mask([12, 7, 1], LI), _mask([5, 2, 3], LT)


def _random_parameters(module: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.1)
    return module.eval()


def _grounding_dino() -> nn.Module:
    from transformers import GroundingDinoConfig
    from transformers.models.grounding_dino.modeling_grounding_dino import GroundingDinoBiMultiHeadAttention

    config = GroundingDinoConfig(d_model=WIDTH, encoder_ffn_dim=64, encoder_attention_heads=8)
    return _random_parameters(GroundingDinoBiMultiHeadAttention(config))


def test_co_attention_is_grounding_dinos() -> None:
    original = _grounding_dino()
    ours = CoAttention.from_hf(original)
    assert list(ours.state_dict()) == list(original.state_dict())

    def run_original(m: Any, xs: list[torch.Tensor]) -> list[torch.Tensor]:
        (image, _), (text, _) = m(*xs, vision_attention_mask=~IMAGE_MASK, text_attention_mask=~TEXT_MASK)
        return [image * IMAGE_MASK[..., None], text * TEXT_MASK[..., None]]

    def run_ours(m: Any, xs: list[torch.Tensor]) -> list[torch.Tensor]:
        return list(m(*xs, image_mask=IMAGE_MASK, text_mask=TEXT_MASK))

    compare(ours, original, [torch.randn(B, LI, WIDTH), torch.randn(B, LT, WIDTH)], run_ours, run_original)


@ABSORB
def test_shared_is_lxmerts(absorb: Any) -> None:
    from transformers import LxmertConfig
    from transformers.models.lxmert.modeling_lxmert import LxmertCrossAttentionLayer

    original = _random_parameters(LxmertCrossAttentionLayer(LxmertConfig(hidden_size=WIDTH, num_attention_heads=HEADS)))
    ours = SharedCrossAttention.from_hf(original, absorb)
    assert list(ours.state_dict()) == list(original.state_dict())

    def additive(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, -torch.inf)[:, None, None]

    def run_original(m: Any, xs: list[torch.Tensor]) -> list[torch.Tensor]:
        text, image = xs
        a = m(text, image, additive(IMAGE_MASK, text.dtype))[0]
        b = m(image, text, additive(TEXT_MASK, text.dtype))[0]
        return [a * TEXT_MASK[..., None], b * IMAGE_MASK[..., None]]

    def run_ours(m: Any, xs: list[torch.Tensor]) -> list[torch.Tensor]:
        return list(m(*xs, text_mask=TEXT_MASK, image_mask=IMAGE_MASK))

    compare(ours, original, [torch.randn(B, LT, WIDTH), torch.randn(B, LI, WIDTH)], run_ours, run_original)


def compare_on_every_length(ours: nn.Module, original: nn.Module) -> None:
    """The module on images with a mask against the original, which takes none, on each image's own tokens."""
    assert list(ours.state_dict()) == list(original.state_dict())

    def run_original(m: Any, xs: list[torch.Tensor]) -> list[torch.Tensor]:
        return [torch.cat([m(x[None, :n]) for x, n in zip(xs[0], [12, 7, 1], strict=True)])]

    def run_ours(m: Any, xs: list[torch.Tensor]) -> list[torch.Tensor]:
        return [m(xs[0], context_mask=IMAGE_MASK)]

    compare(ours, original, [torch.randn(B, LI, WIDTH)], run_ours, run_original)


@ABSORB
@pytest.mark.parametrize("qk_norm", [False, True])
def test_gated_block_is_idefics(absorb: Any, qk_norm: bool) -> None:
    from transformers import IdeficsConfig
    from transformers.models.idefics.modeling_idefics import IdeficsGatedCrossAttentionLayer

    config = IdeficsConfig(
        hidden_size=WIDTH,
        num_attention_heads=HEADS,
        intermediate_size=48,
        qk_layer_norms=qk_norm,
        vision_config={"embed_dim": 24, "num_attention_heads": 4},
    )
    config._attn_implementation = "eager"
    original = _random_parameters(IdeficsGatedCrossAttentionLayer(config, layer_idx=0))
    ours = GatedCrossAttentionBlock.from_hf(original, absorb)
    media = torch.tensor([[0, 1, 0, 1, 0], [1, 0, 0, 0, 0], [0, 0, 1, 0, 0]]).bool()
    ranges = media_kv_range(media, None, 6)
    place = torch.arange(LI)
    seen = (place >= ranges[..., :1]) & (place < ranges[..., 1:])

    def run_original(m: Any, xs: list[torch.Tensor]) -> list[torch.Tensor]:
        mask = torch.zeros(seen.shape, dtype=xs[0].dtype).masked_fill(~seen, torch.finfo(torch.float32).min)[:, None]
        gate = seen.any(-1)
        return [m(xs[0], image_hidden_states=xs[1], image_attention_mask=mask, cross_attention_gate=gate)]

    def run_ours(m: Any, xs: list[torch.Tensor]) -> list[torch.Tensor]:
        return [m(xs[0], xs[1], kv_range=ranges)]

    inputs = [torch.randn(B, LT, WIDTH), torch.randn(B, LI, 24)]
    compare(ours, original, inputs, run_ours, run_original, exact=1e-5)  # the norms work in float32
    with torch.no_grad():
        kv = ours.precompute_kv(inputs[1])
        cached = ours(inputs[0], context_kv=kv, kv_range=ranges)
        torch.testing.assert_close(cached, ours(inputs[0], inputs[1], kv_range=ranges), rtol=1e-4, atol=1e-5)


@ABSORB
@pytest.mark.parametrize("qk_norm", [False, True])
def test_perceiver_is_idefics_on_every_length(absorb: Any, qk_norm: bool) -> None:
    from transformers import IdeficsConfig
    from transformers.models.idefics.perceiver import IdeficsPerceiverResampler

    config = IdeficsConfig(vision_config={"embed_dim": WIDTH, "num_attention_heads": 4})
    config.perceiver_config.qk_layer_norms_perceiver = qk_norm
    original = _random_parameters(IdeficsPerceiverResampler(config, WIDTH, 2, HEADS, 12, 3))
    ours = PerceiverResampler.from_hf(original, absorb)
    compare_on_every_length(ours, original)


@ABSORB
def test_siglip_pooler(absorb: Any) -> None:
    from transformers import SiglipVisionConfig
    from transformers.models.siglip.modeling_siglip import SiglipMultiheadAttentionPoolingHead

    config = SiglipVisionConfig(hidden_size=WIDTH, num_attention_heads=HEADS, intermediate_size=48)
    original = _random_parameters(SiglipMultiheadAttentionPoolingHead(config))
    ours = SiglipPooler.from_hf(original, absorb)
    compare_on_every_length(ours, original)


@ABSORB
def test_attentional_pooler_is_its_formula(absorb: Any) -> None:
    ours = AttentionalPooler(WIDTH, 24, HEADS, queries=3, absorb=absorb)
    plain = nn.MultiheadAttention(WIDTH, HEADS, kdim=24, vdim=24, batch_first=True)
    plain.load_state_dict(ours.attn.state_dict())
    context = torch.randn(B, LI, 24)
    features = ours.ln_k(context)
    query = ours.ln_q(ours.query).expand(B, -1, -1)
    expected = plain(query, features, features, key_padding_mask=~IMAGE_MASK)[0]
    torch.testing.assert_close(ours(context, context_mask=IMAGE_MASK), expected, rtol=1e-4, atol=1e-5)
    packed = ours(PackedTokens.from_padded(context, IMAGE_MASK))
    assert torch.equal(packed, ours(context, context_mask=IMAGE_MASK))


def test_projector_is_llavas_and_idefics3s() -> None:
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig
    from transformers.models.idefics3.configuration_idefics3 import Idefics3Config
    from transformers.models.idefics3.modeling_idefics3 import Idefics3Connector
    from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

    llava = LlavaConfig(
        vision_config=CLIPVisionConfig(hidden_size=24), text_config=LlamaConfig(hidden_size=40, num_attention_heads=4)
    )
    original = LlavaMultiModalProjector(llava)
    ours = VisualProjector.from_hf(original)
    features = torch.randn(2, 16, 24)
    assert torch.equal(ours(features), original(features))
    assert list(ours.state_dict()) == list(original.state_dict())

    config = Idefics3Config(scale_factor=2)
    config.vision_config.hidden_size, config.text_config.hidden_size = 24, 40
    connector = Idefics3Connector(config)
    shuffled = VisualProjector.from_hf(connector)
    expected = connector(features)
    torch.testing.assert_close(shuffled(features), expected)
    packed = shuffled(PackedTokens.from_padded(features), grids=[(4, 4), (4, 4)])
    torch.testing.assert_close(packed.values, expected.flatten(0, 1))
    with pytest.raises(ValueError, match="multiples of factor"):
        pixel_shuffle(PackedTokens.from_padded(features), [(2, 8), (1, 16)], 2)
    # Grids whose sizes add up but belong to other images would mix them.
    with pytest.raises(ValueError, match="image 0 has 16 tokens and grid 2 x 4"):
        pixel_shuffle(PackedTokens.from_padded(features), [(2, 4), (4, 6)], 2)
    for grids, factor, error, words in (
        ([(-4, -4), (4, 4)], 2, ValueError, "at least 0"),
        ([(4, 4)], 2, ValueError, "one entry per image, 2; got 1"),
        ([(4, 4), (4, 4)], 0, ValueError, "factor must be at least 1; got 0"),
        ([(4, 4), (4, 4)], True, TypeError, "factor must be an int; got bool"),
    ):
        with pytest.raises(error, match=words):
            pixel_shuffle(PackedTokens.from_padded(features), grids, factor)
    with pytest.raises(ValueError, match="grids must be given where images are not square; got 15 tokens"):
        shuffled(features[:, :15])


@ABSORB
def test_temporal_window_is_a_mask(absorb: Any) -> None:
    ours = TemporalCrossAttention(WIDTH, HEADS, before=1.0, after=0.25, absorb=absorb)
    plain = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
    plain.load_state_dict(ours.state_dict())
    query, context = torch.randn(B, LT, WIDTH), torch.randn(B, LI, WIDTH)
    times_q, times_k = torch.rand(B, LT) * 3, (torch.rand(B, LI) * 3).sort(1).values
    offset = times_k[:, None] - times_q[..., None]
    seen = (offset >= -1.0) & (offset <= 0.25) & IMAGE_MASK[:, None]
    hidden = ~seen.repeat_interleave(HEADS, 0)
    expected = plain(query, context, context, attn_mask=hidden)[0]
    expected = torch.where(seen.any(-1, keepdim=True), expected, plain.out_proj.bias)
    out = ours(query, context, times_q, times_k, query_mask=TEXT_MASK, context_mask=IMAGE_MASK)
    torch.testing.assert_close(out[TEXT_MASK], expected[TEXT_MASK], rtol=1e-4, atol=1e-5)


def test_times_of_integers_are_exact() -> None:
    """Nanoseconds since 1970 lie far beyond what float32 and float64 tell apart."""
    torch.manual_seed(0)
    ours = TemporalCrossAttention(WIDTH, HEADS, before=2, after=0)
    query, context = torch.randn(1, 4, WIDTH), torch.randn(1, 6, WIDTH)
    times_q, times_k = torch.tensor([[3, 5, 8, 9]]), torch.tensor([[0, 2, 3, 5, 6, 9]])
    expected = ours(query, context, times_q.double(), times_k.double())
    for base in (2**24 + 1, 2**53 + 1, 1_764_432_000_000_000_001):
        torch.testing.assert_close(ours(query, context, times_q + base, times_k + base), expected, rtol=0, atol=0)
    mixed = ours(query, context, times_q.float() + 2**24, (times_k + 2**24).int())
    rounded = ours(query, context, (times_q.float() + 2**24).long(), times_k + 2**24)
    torch.testing.assert_close(mixed, rounded, rtol=0, atol=0)
    for before in (float("nan"), -1.0, True):
        with pytest.raises((TypeError, ValueError), match="before must"):
            TemporalCrossAttention(WIDTH, HEADS, before=before)
    for times, words in (
        (times_k.flip(1), "key_times must ascend within each sequence; got 9 then 6 at row 1"),
        (times_k[:, :5], r"context_times must have shape \(1, 6\), like its tokens; got \(1, 5\)"),
        (times_k / 0.0 * 0, "key_times must not be NaN"),
    ):
        with pytest.raises(ValueError, match=words):
            ours(query, context, times_q, times)


def test_modality_gate() -> None:
    torch.manual_seed(0)
    gate = ModalityGate(3, 8, dropout=0.6)
    inputs = [torch.randn(64, 8) for _ in range(3)]
    present = torch.rand(64, 3) < 0.7
    present[0] = False
    dirty = [torch.where(present[:, i, None], x, torch.nan).requires_grad_() for i, x in enumerate(inputs)]
    out, weights = gate.eval()(dirty, present)
    assert out.isfinite().all()
    assert out[0].eq(0).all()
    assert weights[~present].eq(0).all()
    torch.testing.assert_close(weights[1:].sum(1)[present[1:].any(1)], torch.ones(int(present[1:].any(1).sum())))
    out.sum().backward()
    assert all(x.grad is not None and x.grad.isfinite().all() for x in dirty)
    assert gate.score.weight.grad is not None
    assert gate.score.weight.grad.isfinite().all()
    _, dropped = gate.train()(inputs)
    kept = dropped > 0
    assert kept.any(1).all(), "the last modality of a sample is never dropped"
    assert 0.3 < kept.float().mean() < 0.75
