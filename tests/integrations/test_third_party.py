"""Flamingo's and TorchMultimodal's calls beyond the plain one: caches, causal and additive masks, no media places."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import zoo_detection  # noqa: F401  registers the adapters of the stand-ins
from doubles import MaskedCrossAttention, MultiHeadAttentionWithCache, MultiHeadSelfAttention
from torch import Tensor, nn

from fastxattn.integrations import accelerate, core, kept, restore


@pytest.fixture(autouse=True)
def _even_the_smallest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(core, "SMALL", 0)
    torch.manual_seed(0)


def same(module: nn.Module, *args: Any, **kwargs: Any) -> None:
    """Accelerated and original agree, without gradients and with them."""
    twin = copy.deepcopy(module)
    assert accelerate(module)
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            torch.testing.assert_close(module(*args, **kwargs), twin(*args, **kwargs), atol=2e-6, rtol=1e-5)
    restore(module)


def media_and_text(length: int = 9) -> tuple[Tensor, Tensor, Tensor]:
    places = torch.zeros(2, length, dtype=torch.bool)
    places[0, [2, 5]] = places[1, 1] = True
    return torch.randn(2, length, 64), torch.randn(2, 3, 6, 48), places


@pytest.mark.parametrize("immediate", [True, False])
def test_flamingo_without_places_sees_everything(immediate: bool) -> None:
    x, media, _ = media_and_text()
    same(MaskedCrossAttention(64, 48, immediate=immediate).eval(), x, media)


@pytest.mark.parametrize("immediate", [True, False])
def test_flamingo_with_more_places_than_media(immediate: bool) -> None:
    x, media, places = media_and_text()
    places[0, 6:] = True  # five places, three media: the text at the last two averages all values, or sees all media
    same(MaskedCrossAttention(64, 48, immediate=immediate).eval(), x, media, places)


@pytest.mark.parametrize("immediate", [True, False])
def test_flamingo_projects_cached_media_once(immediate: bool) -> None:
    module = MaskedCrossAttention(64, 48, immediate=immediate).eval()
    x, media, places = media_and_text()
    steps = [torch.randn(2, 1, 64) for _ in range(3)]
    calls: list[int] = []
    module.to_kv.register_forward_hook(lambda m, args, out: calls.append(args[0].shape[1]))

    @torch.no_grad()
    def decode() -> list[Tensor]:
        return [module(x, media, places), *(module(s, media, places, use_cached_media=True) for s in steps)]

    expected = decode()
    assert len(calls) == 4
    accelerate(module)
    calls.clear()
    torch.testing.assert_close(decode(), expected, atol=2e-6, rtol=1e-5)
    assert calls == [18]
    media[0, 0] += 1.0  # written to in place: projected anew
    decode()
    assert calls == [18, 18]
    kept.forget(module)
    decode()
    assert len(calls) == 3


def test_flamingo_in_training_projects_the_media_that_are_seen() -> None:
    module = MaskedCrossAttention(64, 48)
    x, media, places = media_and_text()
    accelerate(module)
    rows: list[int] = []
    module.to_kv.register_forward_hook(lambda m, args, out: rows.append(args[0].shape[0]))
    module(x, media, places).sum().backward()
    assert rows == [18]  # two media of the first text and one of the second, of six
    assert module.to_kv.weight.grad is not None
    with pytest.raises(AssertionError, match="differ in length"):
        module(x[:, :4], media, places)


@pytest.mark.parametrize("mask", ["none", "causal", "plane", "float", "cache", "dropout"])
def test_torchmultimodal_calls(mask: str) -> None:
    module = MultiHeadAttentionWithCache(64, 48, 4, dropout=0.5 if mask == "dropout" else 0.0).eval()
    query, image = torch.randn(2, 7, 64), torch.randn(2, 11, 48)
    seen = (torch.arange(11) < torch.tensor([11, 4])[:, None])[:, None, None]
    if mask == "dropout":
        accelerate(module)
        torch.manual_seed(1)
        first = module(query, image, image)
        restore(module)
        torch.manual_seed(1)
        assert torch.equal(module(query, image, image), first)
        return
    options: dict[str, Any] = {
        "none": {},
        "causal": {"is_causal": True},
        "plane": {"attn_mask": torch.rand(7, 11) > 0.3},
        "float": {"attn_mask": torch.where(seen, 0.0, torch.finfo(torch.float32).min)},
        "cache": {
            "attn_mask": torch.nn.functional.pad(seen, (5, 0), value=True),
            "use_cache": True,
            "past_key_value": (torch.randn(2, 4, 5, 16), torch.randn(2, 4, 5, 16)),
        },
    }[mask]
    same(module, query, image, torch.randn(2, 11, 48) if mask == "plane" else image, **options)


@pytest.mark.parametrize("causal", [False, True])
def test_torchmultimodal_self_attention(causal: bool) -> None:
    same(MultiHeadSelfAttention(64, 4).eval(), torch.randn(2, 7, 64), is_causal=causal)
