"""The padded layout: equal to packing by hand, on every backend, and with no work or copies for absent tokens."""

import pytest
import torch

import fastxattn
from fastxattn import PackedTokens
from fastxattn.ops.attention import padded
from fastxattn.runtime import native


@pytest.fixture(params=["reference", "cpu"])
def backend(request):
    if request.param == "cpu" and (reason := native.cpu_library().reason):
        pytest.skip(reason)
    return request.param


def inputs(batch=3, n=6, m=9, heads=4, kv_heads=2, dim=8):
    g = torch.Generator().manual_seed(0)
    query = torch.randn(batch, n, heads, dim, generator=g)
    key, value = (torch.randn(batch, m, kv_heads, dim, generator=g) for _ in range(2))
    return query, key, value


def masks(pattern, batch=3, n=6, m=9):
    g = torch.Generator().manual_seed(1)
    if pattern == "none":
        return None, None
    if pattern == "prefix":
        return tuple(torch.arange(s) < torch.tensor([[s], [0], [s // 2]]) for s in (n, m))
    if pattern == "left":
        return tuple(torch.arange(s) >= torch.tensor([[s // 2], [1], [s]]) for s in (n, m))
    return torch.rand(batch, n, generator=g) > 0.4, torch.rand(batch, m, generator=g) > 0.4


def dense(query, key, value, mask_q, mask_k, bias=None, kv_range=None, key_bias=None):
    """Softmax over everything with what is hidden at -inf, in float64."""
    query, key, value = (t.double().transpose(1, 2) for t in (query, key, value))
    groups = query.shape[1] // key.shape[1]
    scores = query @ key.repeat_interleave(groups, 1).mT * query.shape[-1] ** -0.5
    scores = scores if bias is None else scores + bias.double()
    if key_bias is not None:
        scores = scores + key_bias.double().reshape(*key_bias.shape[:2], -1).permute(0, 2, 1)[:, :, None]
    seen = torch.ones(scores.shape, dtype=torch.bool)
    if mask_k is not None:
        seen = seen & mask_k[:, None, None]
    if mask_q is not None:
        seen = seen & mask_q[:, None, :, None]
    if kv_range is not None:
        place, (start, end) = (
            torch.arange(scores.shape[-1]),
            kv_range.expand(scores.shape[0], -1, 2)[:, None].split(1, -1),
        )
        seen = seen & (place >= start) & (place < end)
    scores = scores.masked_fill(~seen, -torch.inf)
    weights = scores.softmax(-1).nan_to_num()
    return (weights @ value.repeat_interleave(groups, 1)).transpose(1, 2), scores.logsumexp(-1)


@pytest.mark.parametrize("pattern", ["none", "prefix", "left", "random"])
@pytest.mark.parametrize(
    "option", ["plain", "bias", "bias_keys", "kv_range", "kv_range_shared", "key_bias", "key_bias_heads"]
)
def test_against_dense_masks(backend, pattern, option):
    query, key, value = inputs()
    mask_q, mask_k = masks(pattern)
    g = torch.Generator().manual_seed(2)
    options = {
        "plain": {},
        "bias": {"bias": torch.randn(3, 4, 6, 9, generator=g)},
        "bias_keys": {"bias": torch.randn(4, 1, 9, generator=g)},
        "kv_range": {"kv_range": torch.randint(0, 10, (3, 6, 2), generator=g, dtype=torch.int32).sort(-1).values},
        "kv_range_shared": {"kv_range": torch.tensor([[0, 3], [2, 9], [4, 4], [9, 9], [0, 9], [8, 9]]).int()},
        "key_bias": {"key_bias": torch.randn(3, 9, generator=g)},
        "key_bias_heads": {"key_bias": torch.randn(3, 9, 4, generator=g)},
    }[option]
    out, lse = fastxattn.cross_attention(
        query, key, value, query_mask=mask_q, key_mask=mask_k, return_lse=True, backend=backend, **options
    )
    wanted, wanted_lse = dense(query, key, value, mask_q, mask_k, **options)
    torch.testing.assert_close(out.double(), wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse.double(), wanted_lse, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("pattern", ["prefix", "left", "random"])
def test_absent_tokens_may_hold_nan(backend, pattern):
    """Forward and backward, bit for bit."""
    mask_q, mask_k = masks(pattern)
    found = []
    for junk in (0.0, float("nan"), float("inf")):
        leaves = [
            torch.where(mask[..., None, None], t, junk).requires_grad_()
            for t, mask in zip(inputs(), (mask_q, mask_k, mask_k), strict=True)
        ]
        out = fastxattn.cross_attention(*leaves, query_mask=mask_q, key_mask=mask_k, backend=backend)
        found.append((out.detach(), *torch.autograd.grad(out.square().sum(), leaves)))
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            assert torch.equal(a, b)
    for grad, mask in zip(found[0], (mask_q, mask_q, mask_k, mask_k), strict=True):
        assert not grad[~mask].any()


@pytest.mark.parametrize("shape", [(3, 4, 6, 9), (1, 4, 1, 9), (3, 1, 6, 1), (6, 9), (9,), ()])
def test_bias_gradient_is_summed_over_broadcast_axes(backend, shape):
    mask_q, mask_k = masks("random")
    bias = torch.randn(shape, requires_grad=True)
    full = bias.detach().expand(3, 4, 6, 9).clone().requires_grad_()
    grads = []
    for b in (bias, full):
        out = fastxattn.cross_attention(*inputs(), query_mask=mask_q, key_mask=mask_k, bias=b, backend=backend)
        grads.append(torch.autograd.grad(out.square().sum(), b)[0])
    torch.testing.assert_close(grads[0], grads[1].sum_to_size(shape), rtol=1e-4, atol=1e-5)


def test_equal_to_packing_by_hand(backend):
    query, key, value = inputs()
    mask_q, mask_k = masks("random")
    q, k, v = (PackedTokens.from_padded(t, m) for t, m in ((query, mask_q), (key, mask_k), (value, mask_k)))
    packed = fastxattn.varlen_cross_attention(q.values, k.values, v.values, q.cu_seqlens, k.cu_seqlens, backend=backend)
    out = fastxattn.cross_attention(query, key, value, query_mask=mask_q, key_mask=mask_k, backend=backend)
    assert torch.equal(out[mask_q], packed)
    assert not out[~mask_q].any()


@pytest.mark.parametrize("looks", [True, False])
@pytest.mark.parametrize("pattern", ["prefix", "left", "random"])
def test_index_lists_the_tokens_that_are_there(pattern, looks, monkeypatch):
    """With and without looking at the mask (a GPU, a trace) the slots in use are the same tokens in the same order."""
    mask, _ = masks(pattern)
    monkeypatch.setattr(padded, "_may_look", lambda mask: looks)
    used, index = padded._rows_in_use("query_mask", mask, torch.zeros(3, 6, 1, 1))
    assert (index is None) == (looks and pattern == "prefix")
    index = torch.arange(18) if index is None else index
    for b in range(3):
        rows = index[b * 6 : b * 6 + int(used[b])] - b * 6
        assert rows.tolist() == mask[b].nonzero().flatten().tolist()
    assert sorted(index.tolist()) == list(range(18))


def test_no_copy_of_tokens(monkeypatch):
    """The kernel gets views of the caller's memory."""
    query, key, value = inputs()
    mask_q, mask_k = masks("random")
    layout = padded.Layout.of(query, key, value, mask_q, mask_k)
    for t, given in zip((layout.tokens[name] for name in ("query", "key", "value")), (query, key, value), strict=True):
        assert t.data_ptr() == given.data_ptr()


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (2, 3, 0)])
def test_nothing_there(backend, shape):
    batch, n, m = shape
    query, key, value = inputs(batch, n, m)
    mask_q, mask_k = torch.ones(batch, n, dtype=torch.bool), torch.ones(batch, m, dtype=torch.bool)
    out = fastxattn.cross_attention(query, key, value, query_mask=mask_q, key_mask=mask_k, backend=backend)
    assert out.shape == (batch, n, 4, 8)
    assert not out.any()
