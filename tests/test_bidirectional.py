"""Bidirectional co-attention against one float64 matrix of scores with a softmax along each axis."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before the first import of triton

import fastxattn
from fastxattn.ops.bidirectional.reference import bidirectional_reference
from fastxattn.testing import measure_error

NAMES = ("query_a", "query_b", "value_a", "value_b", "bias_a", "bias_b")


def make(dtype):
    g = torch.Generator().manual_seed(0)
    given = {
        "query_a": torch.randn(152, 4, 64, generator=g).to(dtype),
        "query_b": torch.randn(130, 4, 64, generator=g).to(dtype),
        "value_a": torch.randn(152, 4, 32, generator=g).to(dtype),
        "value_b": torch.randn(130, 4, 48, generator=g).to(dtype),
        "bias_a": torch.randn(152, generator=g),
        "bias_b": torch.randn(130, 4, generator=g),
    }
    offsets = [torch.tensor(o, dtype=torch.int32) for o in ([0, 60, 60, 150, 152], [0, 50, 62, 130, 130])]
    return given, offsets


def results(fn, given, offsets, **options):
    leaves = {n: t.detach().clone().requires_grad_() for n, t in given.items()}
    outs = fn(*(leaves[n] for n in NAMES[:4]), *offsets, bias_a=leaves["bias_a"], bias_b=leaves["bias_b"], **options)
    g = torch.Generator().manual_seed(1)
    cotangents = [torch.randn(o.shape, generator=g).to(o.dtype) for o in outs]
    grads = torch.autograd.grad(outs, list(leaves.values()), cotangents)
    return dict(zip(("out_a", "out_b", *NAMES), (*outs, *grads), strict=True))


@pytest.mark.parametrize(
    ("backend", "dtype"),
    [(b, d) for b in ("reference", "cpu") for d in (torch.float32, torch.bfloat16)] + [("triton", torch.float32)],
    ids=str,
)
@pytest.mark.parametrize("softcap", [0.0, 3.0])
def test_budget(backend, dtype, softcap):
    if backend == "triton" and torch.cuda.is_available():
        pytest.skip("the device runs the attention contract, which this is made of")
    given, offsets = make(dtype)
    ours = results(fastxattn.bidirectional_attention, given, offsets, backend=backend, softcap=softcap)
    wide = {n: t.double() for n, t in given.items()}
    oracle = results(bidirectional_reference, wide, offsets, scale=0.125, softcap=softcap)
    eager = results(bidirectional_reference, given, offsets, scale=0.125, softcap=softcap)
    for name, value in ours.items():
        report = measure_error(name, value, oracle[name], eager[name], backward=not name.startswith("out"))
        assert report.ok, str(report)


def test_empty_sides_give_zero():
    given, offsets = make(torch.float32)
    out_a, out_b = fastxattn.bidirectional_attention(*(given[n] for n in NAMES[:4]), *offsets)
    assert not out_a[150:].any(), "side b of the last sequence is empty"
    assert not out_b[50:62].any(), "side a of the second sequence is empty"


def test_directions_drop_their_own_weights():
    q, ones = torch.zeros(64, 1, 8), torch.ones(64, 1, 8)
    offsets = torch.tensor([0, 64], dtype=torch.int32)
    a, b = fastxattn.bidirectional_attention(q, q, ones, ones, offsets, offsets, dropout_p=0.5, dropout_seed=3)
    assert not torch.equal(a, b)
    again, _ = fastxattn.bidirectional_attention(q, q, ones, ones, offsets, offsets, dropout_p=0.5, dropout_seed=3)
    assert torch.equal(a, again)


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"query_b": torch.zeros(130, 2, 64)}, ValueError, "query_b must have the heads of query_a, 4; got 2"),
        ({"query_b": torch.zeros(130, 4, 8)}, ValueError, "query_b must have the head_dim of query_a, 64; got 8"),
        ({"value_a": torch.zeros(3, 4, 8)}, ValueError, "value_a must have as many tokens as query_a, 152; got 3"),
        ({"value_b": None}, TypeError, "value_b must be a torch.Tensor; got NoneType"),
        ({"query_a": torch.zeros(152, 64)}, ValueError, "query_a must have shape"),
    ],
    ids=str,
)
def test_bad_input(change, error, match):
    given, offsets = make(torch.float32)
    with pytest.raises(error, match=match):
        fastxattn.bidirectional_attention(*((given | change)[n] for n in NAMES[:4]), *offsets)
