"""MultiheadCrossAttention against torch.nn.MultiheadAttention: weights, outputs, gradients, padding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from fastxattn import PackedTokens
from fastxattn.nn import MultiheadCrossAttention
from fastxattn.testing.parity import compare

BATCH, LQ, LK, EMBED, HEADS = 3, 5, 11, 32, 4


def _originals(kdim: int | None = None, vdim: int | None = None, bias: bool = True) -> nn.MultiheadAttention:
    torch.manual_seed(0)
    original = nn.MultiheadAttention(EMBED, HEADS, bias=bias, kdim=kdim, vdim=vdim, batch_first=True)
    if bias:
        nn.init.normal_(original.in_proj_bias, std=0.3)
        nn.init.normal_(original.out_proj.bias, std=0.3)
    return original


def _masks() -> tuple[torch.Tensor, torch.Tensor]:
    lengths_q, lengths_k = torch.tensor([5, 2, 3]), torch.tensor([11, 7, 1])
    return torch.arange(LQ) < lengths_q[:, None], torch.arange(LK) < lengths_k[:, None]


@pytest.mark.parametrize("absorb", ["on", "off"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kdim", [None, 24])
def test_matches_torch_forward_and_backward(absorb: Any, bias: bool, kdim: int | None) -> None:
    original = _originals(kdim, kdim, bias)
    ours = MultiheadCrossAttention(EMBED, HEADS, bias=bias, kdim=kdim, vdim=kdim, absorb=absorb)
    ours.load_state_dict(original.state_dict())
    query, context = torch.randn(BATCH, LQ, EMBED), torch.randn(BATCH, LK, kdim or EMBED)
    query_mask, context_mask = _masks()

    def run_ours(module: Any, xs: list[torch.Tensor]) -> list[torch.Tensor]:
        return [module(*xs, query_mask=query_mask, context_mask=context_mask)]

    def run_original(module: Any, xs: list[torch.Tensor]) -> list[torch.Tensor]:
        q, c = xs
        return [module(q, c, c, key_padding_mask=~context_mask, need_weights=False)[0] * query_mask[..., None]]

    compare(ours, original, [query, context], run_ours, run_original)


@pytest.mark.parametrize("kdim", [None, 24])
def test_state_dict_is_torchs(kdim: int | None) -> None:
    original = _originals(kdim, kdim)
    ours = MultiheadCrossAttention(EMBED, HEADS, kdim=kdim, vdim=kdim)
    assert list(ours.state_dict()) == list(original.state_dict())
    assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in original.state_dict().items()}
    back = nn.MultiheadAttention(EMBED, HEADS, kdim=kdim, vdim=kdim)
    back.load_state_dict(ours.state_dict())
    shared = MultiheadCrossAttention.from_torch(original)
    assert {p.data_ptr() for p in shared.parameters()} == {p.data_ptr() for p in original.parameters()}


def test_from_torch_refuses_what_it_cannot_do() -> None:
    with pytest.raises(ValueError, match="add_bias_kv"):
        MultiheadCrossAttention.from_torch(nn.MultiheadAttention(EMBED, HEADS, add_bias_kv=True))
    with pytest.raises(ValueError, match="divide"):
        MultiheadCrossAttention(30, 4)


@pytest.mark.parametrize("absorb", ["on", "off"])
def test_packed_is_padded_and_garbage_in_padding_changes_nothing(absorb: Any) -> None:
    ours = MultiheadCrossAttention.from_torch(_originals(), absorb=absorb)
    query, context = torch.randn(BATCH, LQ, EMBED), torch.randn(BATCH, LK, EMBED)
    query_mask, context_mask = _masks()
    with torch.no_grad():
        padded = ours(query, context, query_mask=query_mask, context_mask=context_mask)
        packed = ours(PackedTokens.from_padded(query, query_mask), PackedTokens.from_padded(context, context_mask))
    assert torch.equal(packed.to_padded(length=LQ)[0], padded)
    assert torch.equal(padded[~query_mask], torch.zeros_like(padded[~query_mask]))
    dirty_q = torch.where(query_mask[..., None], query, torch.nan).requires_grad_()
    dirty_c = torch.where(context_mask[..., None], context, torch.nan).requires_grad_()
    out = ours(dirty_q, dirty_c, query_mask=query_mask, context_mask=context_mask)
    assert torch.equal(out, padded)
    out.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in ours.parameters())
    assert dirty_q.grad is not None
    assert dirty_c.grad is not None
    assert dirty_q.grad.isfinite().all()
    assert dirty_c.grad[~context_mask].eq(0).all()


def test_nan_beyond_the_last_offset_reaches_no_weight_gradient() -> None:
    ours = MultiheadCrossAttention.from_torch(_originals())
    values = torch.randn(9, EMBED)
    values[7:] = torch.nan
    tokens = PackedTokens(values, torch.tensor([0, 3, 7], dtype=torch.int32), 4)
    out = ours(tokens, tokens)
    assert out.values.shape == (9, EMBED)
    out.values.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in ours.parameters())


@pytest.mark.parametrize("absorb", ["on", "off"])
def test_query_without_keys_gets_the_output_bias(absorb: Any) -> None:
    ours = MultiheadCrossAttention.from_torch(_originals(), absorb=absorb)
    mask = torch.tensor([[True] * LK, [False] * LK, [True] * LK])
    out = ours(torch.randn(BATCH, LQ, EMBED), torch.randn(BATCH, LK, EMBED), context_mask=mask)
    assert torch.equal(out[1], ours.out_proj.bias.expand(LQ, EMBED))


@pytest.mark.parametrize("absorb", ["on", "off"])
def test_kv_range_is_a_mask(absorb: Any) -> None:
    original = _originals()
    ours = MultiheadCrossAttention.from_torch(original, absorb=absorb)
    query, context = torch.randn(BATCH, LQ, EMBED), torch.randn(BATCH, LK, EMBED)
    ranges = torch.tensor([[0, 3], [2, 11], [4, 5], [0, 11], [10, 11]], dtype=torch.int32).expand(BATCH, LQ, 2)
    place = torch.arange(LK)
    hidden = (place < ranges[0, :, :1]) | (place >= ranges[0, :, 1:])
    expected = original(query, context, context, attn_mask=hidden, need_weights=False)[0]
    torch.testing.assert_close(ours(query, context, kv_range=ranges), expected, rtol=1e-4, atol=1e-5)


def test_precomputed_context_and_separate_values() -> None:
    original = _originals(24, 40)
    ours = MultiheadCrossAttention.from_torch(original)
    query, context, value = torch.randn(BATCH, LQ, EMBED), torch.randn(BATCH, LK, 24), torch.randn(BATCH, LK, 40)
    _, mask = _masks()
    expected = original(query, context, value, key_padding_mask=~mask, need_weights=False)[0]
    torch.testing.assert_close(ours(query, context, value, context_mask=mask), expected, rtol=1e-4, atol=1e-5)
    kv = ours.precompute_kv(context, value, context_mask=mask)
    torch.testing.assert_close(ours(query, context_kv=kv), expected, rtol=1e-4, atol=1e-5)


def test_refusals_name_the_argument() -> None:
    ours = MultiheadCrossAttention(EMBED, HEADS)
    query, context = torch.randn(BATCH, LQ, EMBED), torch.randn(BATCH, LK, EMBED)
    with pytest.raises(ValueError, match="context or context_kv"):
        ours(query)
    with pytest.raises(ValueError, match="query must have width 32"):
        ours(query[..., :8], context)
    with pytest.raises(ValueError, match="same batch size"):
        ours(query, context[:2])
    with pytest.raises(TypeError, match="context_mask must be boolean"):
        ours(query, context, context_mask=torch.ones(BATCH, LK))
    with pytest.raises(ValueError, match="query_mask must be None"):
        ours(PackedTokens.from_padded(query), context, query_mask=_masks()[0])
    cu = torch.tensor([[0, 3, 7], [0, 4, 7]], dtype=torch.int32)
    tokens, other = (PackedTokens(torch.randn(7, EMBED), row, 7) for row in cu)
    with pytest.raises(ValueError, match=r"value must have the lengths .*, \[3, 4\]; got \[4, 3\]"):
        ours(tokens, tokens, other)
    with pytest.raises(ValueError, match="value must have as many sequences as the tokens it goes with; got 1"):
        ours(tokens, tokens, PackedTokens(torch.randn(7, EMBED), cu[0, [0, 2]], 7))
    with pytest.raises(ValueError, match="value must be given"):
        MultiheadCrossAttention(EMBED, HEADS, kdim=EMBED, vdim=8)(query, context)
