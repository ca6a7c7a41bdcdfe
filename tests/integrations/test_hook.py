"""attn_implementation="fastxattn": the traps of transformers' attention and mask interfaces."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, create_bidirectional_mask, create_causal_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from zoo import TEXT, VISION, lengths_mask

from fastxattn.integrations import core, masks
from fastxattn.integrations.masks import Visible, recognise
from fastxattn.integrations.transformers import attention, register
from fastxattn.integrations.transformers.attention import fastxattn_attention

register()


@pytest.fixture(autouse=True)
def _even_the_smallest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(core, "SMALL", 0)
    torch.manual_seed(0)


class Module(nn.Module):
    is_causal = True  # as on IDEFICS' and BridgeTower's cross-attention, which are not causal


def plain(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None = None, bias: Tensor | float = 0.0) -> Tensor:
    k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], 1) for t in (k, v))
    scores = q.double() @ k.double().mT * q.shape[-1] ** -0.5 + bias
    if seen is not None:
        scores = scores.masked_fill(~seen, -torch.inf)
    return (scores.softmax(-1).nan_to_num(nan=0.0) @ v.double()).transpose(1, 2)


def qkv(batch: int = 2, heads: int = 4, kv: int = 4, lq: int = 5, lk: int = 9, dim: int = 8) -> tuple[Tensor, ...]:
    return torch.randn(batch, heads, lq, dim), torch.randn(batch, kv, lk, dim), torch.randn(batch, kv, lk, dim)


def attend(*args: Any, **kwargs: Any) -> Tensor:
    out, weights = fastxattn_attention(Module(), *args, **kwargs)
    assert weights is None
    return out


def agree(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a.double(), b, atol=2e-6, rtol=1e-5)


def config(**more: Any) -> Any:
    return hf.BertConfig(**TEXT, attn_implementation="fastxattn", **more)


def test_the_mask_function_is_registered() -> None:
    # Without one, transformers makes no mask at all for an implementation it does not know.
    assert "fastxattn" in ALL_ATTENTION_FUNCTIONS
    assert "fastxattn" in ALL_MASK_ATTENTION_FUNCTIONS
    embeds, mask = torch.randn(2, 6, 64), lengths_mask([6, 2], 6)
    assert create_bidirectional_mask(config(), embeds, mask) is not None


def test_padding_masks_are_free_and_four_dimensional() -> None:
    embeds, mask = torch.randn(2, 6, 64), lengths_mask([9, 2], 9)
    made = create_bidirectional_mask(config(), embeds, mask, encoder_hidden_states=torch.randn(2, 9, 64))
    assert made.shape == (2, 1, 6, 9)
    assert made.stride(2) == 0
    assert made.untyped_storage().nbytes() == 2 * 9
    visible = recognise(made, 2, 6, 9)
    assert torch.equal(visible.keys, mask.bool())
    assert visible.ranges is visible.bias is None


@pytest.mark.parametrize("left", [False, True])
def test_causal_masks_become_ranges(left: bool) -> None:
    embeds, mask = torch.randn(2, 6, 64), lengths_mask([6, 4], 6)
    mask = mask.flip(1) if left else mask
    made = create_causal_mask(config(), embeds, mask, past_key_values=None)
    visible = recognise(made, 2, 6, 6)
    assert visible.bias is None
    assert visible.ranges is not None
    q, k, v = qkv(lq=6, lk=6)
    agree(attend(q, k, v, made), plain(q, k, v, made))
    assert recognise(made, 2, 6, 6) is visible  # looked for once, shared by all layers
    made[:, :, 0] = False
    assert recognise(made, 2, 6, 6) is not visible  # unless it was written to


def test_a_causal_mask_is_never_left_to_is_causal() -> None:
    assert create_causal_mask(config(), torch.randn(2, 6, 64), None, past_key_values=None) is not None


def test_is_causal_attributes_are_not_believed() -> None:
    q, k, v = qkv(lq=9)
    agree(attend(q, k, v, None), plain(q, k, v))
    agree(attend(q, k, v, None, is_causal=True), plain(q, k, v, torch.ones(9, 9).tril().bool()))


def test_keys_of_another_length_than_queries() -> None:
    # transformers' own flash path unpads queries with the mask of the keys.
    q, k, v = qkv(lq=5, lk=9)
    seen = lengths_mask([9, 3], 9).bool()[:, None, None].expand(2, 1, 5, 9)
    agree(attend(q, k, v, seen), plain(q, k, v, seen))


@pytest.mark.parametrize("kv", [1, 2, 4])
@pytest.mark.parametrize("cached", [False, True])
def test_grouped_heads_in_both_memory_layouts(kv: int, cached: bool) -> None:
    q, k, v = qkv(kv=kv)
    if not cached:
        k, v = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (k, v))
    seen = lengths_mask([9, 3], 9).bool()[:, None, None]
    agree(attend(q, k, v, seen), plain(q, k, v, seen))


def test_boolean_rows_without_keys_are_zero() -> None:
    q, k, v = qkv()
    seen = torch.rand(2, 1, 5, 9) > 0.5
    seen[0, 0, 2] = False
    out = attend(q, k, v, seen)
    assert torch.equal(out[0, 2], torch.zeros(4, 8))
    agree(out, plain(q, k, v, seen))


def test_additive_rows_without_keys_are_literal_arithmetic() -> None:
    q, k, v = qkv()
    mask = torch.zeros(2, 1, 5, 9)
    mask[:, :, :, 6:] = torch.finfo(torch.float32).min
    mask[0, :, 2] = torch.finfo(torch.float32).min
    out = attend(q, k, v, mask)
    torch.testing.assert_close(out[0, 2], v[0].mean(1))  # score + finfo.min is the same for every key
    literal = torch.softmax(q @ k.mT * 8**-0.5 + mask, -1) @ v
    torch.testing.assert_close(out, literal.transpose(1, 2), atol=2e-6, rtol=1e-5)
    mask = mask.masked_fill(mask < 0, -torch.inf)
    assert torch.equal(attend(q, k, v, mask)[0, 2], torch.zeros(4, 8))  # never NaN


def test_additive_masks_are_recognised_and_biases_are_kept() -> None:
    mask = torch.where(lengths_mask([9, 3], 9).bool(), 0.0, torch.finfo(torch.float32).min)[:, None, None]
    assert torch.equal(recognise(mask, 2, 5, 9).keys, lengths_mask([9, 3], 9).bool())
    q, k, v = qkv()
    bias = torch.randn(2, 1, 5, 9)
    assert recognise(bias, 2, 5, 9).bias is not None
    agree(attend(q, k, v, bias), plain(q, k, v, bias=bias))


def test_masks_without_structure_go_as_bias() -> None:
    q, k, v = qkv()
    seen = torch.rand(2, 4, 5, 9) > 0.4  # per head
    agree(attend(q, k, v, seen), plain(q, k, v, seen))
    seen = torch.tensor([1, 0, 1, 0, 1, 1, 0, 0, 1]).bool().expand(2, 1, 5, 9).clone()
    seen[:, :, 1] = ~seen[:, :, 1]
    assert recognise(seen, 2, 5, 9).bias is not None
    agree(attend(q, k, v, seen), plain(q, k, v, seen))


def test_intervals_across_hidden_keys() -> None:
    # Tiles of two images, the second half of each image hidden from everyone: intervals of what is left.
    seen = torch.zeros(1, 1, 3, 12, dtype=torch.bool)
    seen[..., 0, 0:3] = seen[..., 1, 0:3] = seen[..., 1, 6:9] = seen[..., 2, 6:9] = True
    visible = recognise(seen, 1, 3, 12)
    assert visible.bias is None
    assert visible.packed_ranges().tolist() == [[0, 3], [0, 6], [3, 6]]  # type: ignore[union-attr]
    q, k, v = qkv(batch=1, lq=3, lk=12)
    agree(attend(q, k, v, seen), plain(q, k, v, seen))


def test_position_bias_with_masks_and_its_gradient() -> None:
    q, k, v = qkv()
    seen = lengths_mask([9, 3], 9).bool()[:, None, None].expand(2, 1, 5, 9)
    bias = torch.randn(1, 4, 5, 9, requires_grad=True)
    out = attend(q, k, v, seen, position_bias=bias)
    agree(out.detach(), plain(q, k, v, seen, bias.detach()))
    (grad,) = torch.autograd.grad(out.square().sum(), bias)
    exact = bias.detach().double().requires_grad_()
    (expected,) = torch.autograd.grad(plain(q, k, v, seen, exact).square().sum(), exact)
    torch.testing.assert_close(grad.double(), expected, atol=1e-4, rtol=1e-4)


def test_one_learned_query_for_a_batch_of_keys() -> None:
    q, k, v = qkv()
    agree(attend(q[:1], k, v, None), plain(q[:1], k, v))


def test_softcap_and_scale() -> None:
    q, k, v = qkv()
    out = attend(q, k, v, None, scaling=0.3, softcap=2.0)
    scores = 2 * torch.tanh(q.double() @ k.double().mT * 0.3 / 2)
    agree(out, (scores.softmax(-1) @ v.double()).transpose(1, 2))


def test_dropout_drops() -> None:
    q, k, v = qkv(lk=64)
    out = attend(q, k, torch.ones_like(v), None, dropout=0.5)
    assert 0.5 < out.mean() < 1.5
    assert out.std() > 0.05


def test_attention_maps_on_request() -> None:
    q, k, v = qkv(kv=2)
    seen = lengths_mask([9, 3], 9).bool()[:, None, None]
    out, weights = fastxattn_attention(Module(), q, k, v, seen, output_attentions=True)
    agree(out, plain(q, k, v, seen))
    assert weights is not None
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, 5))
    model = hf.BertModel(config()).eval()
    ids, mask = torch.randint(3, 90, (2, 6)), lengths_mask([6, 2], 6)
    with torch.no_grad():
        ours = model(ids, mask, output_attentions=True).attentions
        model.set_attn_implementation("eager")
        for a, b in zip(ours, model(ids, mask, output_attentions=True).attentions, strict=True):
            torch.testing.assert_close(a[0], b[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("argument", ["s_aux", "cache"])
def test_what_would_lose_its_meaning_is_refused(argument: str) -> None:
    with pytest.raises(ValueError, match="attn_implementation='fastxattn' does not"):
        attend(*qkv(), None, **{argument: torch.zeros(4)})


@pytest.mark.parametrize("mask", [torch.ones(2, 5, 9).bool(), torch.ones(3, 1, 5, 9).bool(), torch.ones(2, 1, 5, 8)])
def test_masks_that_do_not_fit_are_refused(mask: Tensor) -> None:
    with pytest.raises(ValueError, match="attention_mask must"):
        attend(*qkv(), mask)


def test_small_problems_go_to_torch_with_the_same_meaning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(core, "SMALL", 10**9)
    q, k, v = qkv(kv=2)
    for seen in (None, lengths_mask([9, 3], 9).bool()[:, None, None], torch.rand(2, 1, 5, 9) > 0.5):
        agree(attend(q, k, v, seen), plain(q, k, v, seen))
    dead = torch.ones(2, 1, 5, 9).bool()
    dead[0, 0, 1] = False
    assert torch.equal(attend(q, k, v, dead)[0, 1], torch.zeros(4, 8))


@pytest.mark.parametrize("isa", ["avx2", "avx512"])
def test_one_query_goes_where_keys_are_read_faster(monkeypatch: pytest.MonkeyPatch, isa: str) -> None:
    calls: list[str] = []
    run = attention.attend_padded
    monkeypatch.setattr(attention, "attend_padded", lambda *a, **k: calls.append("kernel") or run(*a, **k))
    monkeypatch.setattr(core.native, "active_cpu_isa", lambda: isa)
    q, k, v = qkv(lq=1)
    seen = lengths_mask([9, 3], 9).bool()[:, None, None]
    agree(attend(q, k, v, None), plain(q, k, v))
    assert calls == (["kernel"] if isa == "avx512" else [])
    calls.clear()
    agree(attend(q, k, v, seen), plain(q, k, v, seen))  # half of these keys need not be read
    assert calls == ["kernel"]
    q, k, v = qkv(lq=1, kv=2)
    agree(attend(q, k, v, None), plain(q, k, v))  # several heads read the same keys
    assert calls == ["kernel", "kernel"]


SIGLIP2 = {**{k: v for k, v in VISION.items() if k != "image_size"}, "num_patches": 16}


def siglip2() -> tuple[nn.Module, dict[str, Any]]:
    model = hf.Siglip2VisionModel(hf.Siglip2VisionConfig(**SIGLIP2))
    return model, {
        "pixel_values": torch.randn(2, 16, 192),
        "pixel_attention_mask": lengths_mask([16, 9], 16),
        "spatial_shapes": torch.tensor([[4, 4], [3, 3]]),
    }


def pix2struct() -> tuple[nn.Module, dict[str, Any]]:
    vision = hf.Pix2StructVisionConfig(
        hidden_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        d_ff=64,
        d_kv=16,
        patch_embed_hidden_size=48,
        seq_len=20,
    )
    patches = torch.randn(2, 12, 50)
    patches[..., :2] = torch.randint(1, 9, (2, 12, 2))
    return hf.Pix2StructVisionModel(vision), {"flattened_patches": patches, "attention_mask": lengths_mask([12, 5], 12)}


def bridgetower() -> tuple[nn.Module, dict[str, Any]]:
    text = {**TEXT, "type_vocab_size": 1}
    model = hf.BridgeTowerModel(
        hf.BridgeTowerConfig(
            hidden_size=64,
            num_attention_heads=4,
            num_hidden_layers=1,
            text_config=text,
            vision_config={"hidden_size": 64, "num_hidden_layers": 2, "patch_size": 8, "image_size": 32},
        )
    )
    return model, {
        "input_ids": torch.randint(3, 90, (2, 7)),
        "attention_mask": lengths_mask([7, 4], 7),
        "pixel_values": torch.randn(2, 3, 32, 32),
        "pixel_mask": torch.ones(2, 32, 32).long(),
    }


@pytest.mark.parametrize("build", [siglip2, pix2struct, bridgetower], ids=lambda f: f.__name__)
def test_models_that_a_wrong_mask_breaks(build: Any) -> None:
    model, inputs = build()
    model.eval().set_attn_implementation("eager")
    with torch.no_grad():
        expected = model(**inputs)[0]
        model.set_attn_implementation("fastxattn")
        ours = model(**inputs)[0]
    there = inputs.get("pixel_attention_mask", inputs.get("attention_mask")).bool()
    torch.testing.assert_close(ours[there], expected[there], atol=2e-5, rtol=1e-4)


def test_the_memo_forgets_dead_masks() -> None:
    before = len(masks._memo)
    mask = torch.ones(2, 1, 5, 9).bool()
    recognise(mask, 2, 5, 9)
    assert len(masks._memo) == before + 1
    del mask
    assert len(masks._memo) == before


def test_torch_takes_a_dense_bias_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same numbers as the kernel's, and zeros with finite gradients where a row sees nothing."""
    q, k, v = (torch.randn(2, 3, n, 8, requires_grad=True) for n in (5, 7, 7))
    mask = torch.zeros(2, 1, 5, 7)
    mask[0, 0, :, 4:], mask[1, 0, 2] = -torch.inf, -torch.inf
    found = {}
    for taken in (False, True):
        monkeypatch.setattr(core, "torch_takes_bias", lambda *_, taken=taken: taken)
        out = core.attend_padded(q, k, v, Visible(bias=mask), scale=0.3)
        found[taken] = (out, *torch.autograd.grad(out.square().sum(), (q, k, v)))
    assert not found[True][0][1, 2].any()
    for one, other in zip(found[True], found[False], strict=True):
        torch.testing.assert_close(one, other, atol=2e-6, rtol=1e-5)
