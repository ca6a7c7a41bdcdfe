"""Bad input is refused in words; odd input is ordinary. On every backend that runs here."""

import re

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import fastxattn
from fastxattn.runtime import native
from fastxattn.runtime.backend import use_backend


@pytest.fixture(params=["reference", "cpu", "auto"])
def backend(request):
    if request.param == "cpu" and (reason := native.cpu_library().reason):
        pytest.skip(reason)
    return request.param


def zeros(*shape):
    return torch.zeros(shape, dtype=torch.int32)


def ints(*values):
    return torch.tensor(values, dtype=torch.int32)


def good(**changes):
    torch.manual_seed(0)
    arguments = {
        "query": torch.randn(6, 4, 8),
        "key": torch.randn(9, 2, 8),
        "value": torch.randn(9, 2, 5),
        "cu_seqlens_q": ints(0, 2, 6),
        "cu_seqlens_k": ints(0, 4, 9),
    }
    return {**arguments, **changes}


BAD_VALUES = {
    "query 2-D": ({"query": torch.randn(6, 8)}, "query must have shape (tokens, heads, head_dim); got (6, 8)"),
    "no heads": ({"query": torch.randn(6, 0, 8)}, "query must have at least 1 head"),
    "no channels": (
        {"query": torch.randn(6, 4, 0), "key": torch.randn(9, 2, 0)},
        "query must have at least 1 head and 1 channel",
    ),
    "head_dim": ({"key": torch.randn(9, 2, 7)}, "key must have the head_dim of query, 8; got 7"),
    "value tokens": ({"value": torch.randn(8, 2, 5)}, "value must have as many tokens as key, 9; got 8"),
    "value heads": ({"value": torch.randn(9, 1, 5)}, "value must have as many heads as key, 2; got 1"),
    "groups": (
        {"key": torch.randn(9, 3, 8), "value": torch.randn(9, 3, 5)},
        "the heads of key must divide the heads of query, 4; got 3",
    ),
    "start": ({"cu_seqlens_q": ints(1, 2, 6)}, "cu_seqlens_q must start at 0; got 1"),
    "negative": ({"cu_seqlens_q": ints(-1, 2, 6)}, "cu_seqlens_q must start at 0; got -1"),
    "decrease": ({"cu_seqlens_k": ints(0, 7, 5)}, "cu_seqlens_k must not decrease; got 7 then 5 at sequence 1"),
    "dip below 0": ({"cu_seqlens_k": ints(0, -3, 9)}, "cu_seqlens_k must not decrease; got 0 then -3 at sequence 0"),
    "past the end": ({"cu_seqlens_q": ints(0, 2, 7)}, "cu_seqlens_q must end within the 6 tokens; got 7"),
    "past the end, far": (
        {"cu_seqlens_k": ints(0, 4, 2**31 - 1)},
        "cu_seqlens_k must end within the 9 tokens; got 2147483647",
    ),
    "batches differ": (
        {"cu_seqlens_k": ints(0, 9)},
        "cu_seqlens_k must have as many offsets as cu_seqlens_q, 3; got 2",
    ),
    "no offsets": (
        {"cu_seqlens_q": ints()},
        "cu_seqlens_q must have shape (batch + 1,), at least one offset; got none",
    ),
    "offsets 2-D": ({"cu_seqlens_q": ints(0, 2, 6)[None]}, "cu_seqlens_q must have one axis; got shape (1, 3)"),
    "range rows": ({"kv_range": zeros(5, 2)}, "kv_range must have shape (query tokens, 2), (6, 2)"),
    "range long": ({"kv_range": zeros(7, 2)}, "kv_range must have shape (query tokens, 2), (6, 2)"),
    "range 3 columns": ({"kv_range": zeros(6, 3)}, "kv_range must have shape (query tokens, 2)"),
    "range 1-D": ({"kv_range": ints(0, 1)}, "kv_range must have shape (query tokens, 2); got (2,)"),
    "bias rows": ({"key_bias": torch.zeros(8)}, "key_bias must have one row per key token, 9; got (8,)"),
    "bias heads": ({"key_bias": torch.zeros(9, 2)}, "key_bias must have one column per query head, 4; got (9, 2)"),
    "bias 3-D": ({"key_bias": torch.zeros(9, 4, 1)}, "key_bias must have shape (key tokens,) or (key tokens, heads)"),
    "index high": ({"key_index": ints(*range(8), 9)}, "key_index must lie between 0 and 8; got 9"),
    "index low": ({"key_index": ints(*range(8), -1)}, "key_index must lie between 0 and 8; got -1"),
    "index short": ({"key_index": ints(0, 1)}, "cu_seqlens_k must end within the 2 entries of key_index; got 9"),
    "softcap": ({"softcap": -1.0}, "softcap must be finite and at least 0; got -1.0"),
    "softcap nan": ({"softcap": float("nan")}, "softcap must be finite and at least 0; got nan"),
    "scale": ({"scale": float("inf")}, "scale must be finite; got inf"),
    "dropout 1": ({"dropout_p": 1.0}, "dropout_p must be less than 1; got 1.0"),
    "dropout negative": ({"dropout_p": -0.1}, "dropout_p must be finite and at least 0; got -0.1"),
    "seed 2": ({"dropout_p": 0.1, "dropout_seed": torch.tensor([1, 2])}, "dropout_seed must hold one number"),
    "other device": ({"key": torch.empty(9, 2, 8, device="meta")}, "key must be on the device of query, cpu; got meta"),
    "range elsewhere": (
        {"kv_range": torch.empty(6, 2, dtype=torch.int32, device="meta")},
        "kv_range must be on the device of query",
    ),
}
BAD_TYPES = {
    "list": ({"query": [[1.0]]}, "query must be a tensor; got list"),
    "none": ({"cu_seqlens_k": None}, "cu_seqlens_k must be a tensor; got NoneType"),
    "int query": (
        {"query": torch.ones(6, 4, 8, dtype=torch.int32)},
        "query must be float32, bfloat16, float16 or float64",
    ),
    "mixed": (
        {"value": torch.randn(9, 2, 5).bfloat16()},
        "value must have the dtype of query, torch.float32; got torch.bf",
    ),
    "int64 offsets": ({"cu_seqlens_q": ints(0, 2, 6).long()}, "cu_seqlens_q must be int32; got torch.int64"),
    "float range": ({"kv_range": torch.zeros(6, 2)}, "kv_range must be int32; got torch.float32"),
    "int64 index": ({"key_index": torch.arange(9)}, "key_index must be int32; got torch.int64"),
    "int bias": ({"key_bias": torch.zeros(9, dtype=torch.int32)}, "key_bias must be torch.float32"),
    "scale text": ({"scale": "1"}, "scale must be a number; got str"),
    "float seed": ({"dropout_p": 0.1, "dropout_seed": 1.5}, "dropout_seed must be a tensor; got float"),
    "int32 seed": ({"dropout_p": 0.1, "dropout_seed": ints(1)}, "dropout_seed must be an int or an int64 tensor"),
}


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("name", BAD_VALUES)
def test_bad_values(backend, name, requires_grad):
    changes, message = BAD_VALUES[name]
    fastxattn.varlen_cross_attention(**good(), backend=backend)  # the first call of a process takes the validated path
    arguments = good(**changes)
    arguments["query"].requires_grad_(requires_grad)
    with pytest.raises(ValueError, match=re.escape(message)):
        fastxattn.varlen_cross_attention(**arguments, backend=backend)


@pytest.mark.parametrize("name", BAD_TYPES)
def test_bad_types(backend, name):
    changes, message = BAD_TYPES[name]
    fastxattn.varlen_cross_attention(**good(), backend=backend)
    with pytest.raises(TypeError, match=re.escape(message)):
        fastxattn.varlen_cross_attention(**good(**changes), backend=backend)


PADDED = {"query": torch.randn(2, 3, 4, 8), "key": torch.randn(2, 5, 2, 8), "value": torch.randn(2, 5, 2, 6)}
BAD_PADDED = {
    "3-D": (ValueError, {"query": torch.randn(2, 3, 8)}, "query must have shape (batch, length, heads, dim)"),
    "batch": (ValueError, {"key": torch.randn(3, 5, 2, 8)}, "key must have the batch of query, 2; got 3"),
    "length": (ValueError, {"value": torch.randn(2, 4, 2, 6)}, "value must have the length of key, 5; got 4"),
    "mask shape": (
        ValueError,
        {"key_mask": torch.ones(2, 3, dtype=torch.bool)},
        "key_mask must have shape (batch, length), (2, 5)",
    ),
    "mask dtype": (
        TypeError,
        {"query_mask": torch.ones(2, 3)},
        "query_mask must be boolean, True = valid token",
    ),
    "bias": (
        ValueError,
        {"bias": torch.zeros(2, 4, 3, 4)},
        "bias must broadcast to (batch, heads, Lq, Lk), (2, 4, 3, 5)",
    ),
    "bool bias": (TypeError, {"bias": torch.ones(3, 5, dtype=torch.bool)}, "masks go in key_mask and kv_range"),
    "double bias": (TypeError, {"bias": torch.zeros(3, 5).double()}, "bias must be float32 or of the dtype of query"),
    "range": (
        ValueError,
        {"kv_range": torch.zeros(2, 4, 2, dtype=torch.int32)},
        "kv_range must broadcast to (batch, Lq, 2)",
    ),
    "key_bias": (
        ValueError,
        {"key_bias": torch.zeros(10)},
        "key_bias must have shape (batch, Lk) or (batch, Lk, heads)",
    ),
}


@pytest.mark.parametrize("name", BAD_PADDED)
def test_bad_padded(backend, name):
    error, changes, message = BAD_PADDED[name]
    with pytest.raises(error, match=re.escape(message)):
        fastxattn.cross_attention(**{**PADDED, **changes}, backend=backend)


def test_unknown_and_unable_backends():
    with pytest.raises(ValueError, match=r"backend must be auto or one of .*cpu, .*got 'fast'"):
        fastxattn.varlen_cross_attention(**good(), backend="fast")
    double = {name: t.double() if t.is_floating_point() else t for name, t in good().items()}
    with pytest.raises(RuntimeError, match=r"backend='cpu' cannot run this problem: .*float64"):
        fastxattn.varlen_cross_attention(**double, backend="cpu")
    assert fastxattn.varlen_cross_attention(**double).dtype == torch.float64
    wide = good(value=torch.randn(9, 2, 257))
    with pytest.raises(RuntimeError, match="head_dim and value_dim up to 256, got 8 and 257"):
        fastxattn.varlen_cross_attention(**wide, backend="cpu")
    assert fastxattn.varlen_cross_attention(**wide).shape == (6, 4, 257)


def test_explain():
    said = fastxattn.explain(fastxattn.varlen_cross_attention, **good())
    assert said.op == "attention"
    assert said.chosen in ("cpu", "reference")
    double = {name: t.double() if t.is_floating_point() else t for name, t in good().items()}
    said = fastxattn.explain(fastxattn.varlen_cross_attention, **double)
    assert said.chosen == "reference"
    assert "float64" in str(said)
    with pytest.raises(ValueError, match="'<lambda>' called none"):
        fastxattn.explain(lambda: None)
    with use_backend("reference"):
        assert fastxattn.explain(fastxattn.varlen_cross_attention, **good()).chosen == "reference"


# Odd, and ordinary -----------------------------------------------------------------------------------------------


def call(backend, *, grad=True, **arguments):
    """out, lse and the gradients of query, key and value under ones."""
    leaves = [arguments[n].detach().requires_grad_(grad) for n in ("query", "key", "value")]
    arguments.update(zip(("query", "key", "value"), leaves, strict=True))
    out, lse = fastxattn.varlen_cross_attention(**arguments, return_lse=True, backend=backend)
    grads = torch.autograd.grad(out.sum() + lse[lse > -torch.inf].sum(), leaves) if grad else ()
    return out.detach(), lse.detach(), *grads


def test_empty_sequences(backend):
    """Empty queries, empty keys and both, first, last and in the middle."""
    cu_q, cu_k = ints(0, 0, 2, 2, 5, 6, 6), ints(0, 3, 3, 3, 7, 9, 9)  # lengths 0 2 0 3 1 0 and 3 0 0 4 2 0
    out, lse, dq, dk, dv = call(backend, **good(cu_seqlens_q=cu_q, cu_seqlens_k=cu_k))
    assert not out[:2].any()
    assert (lse[:, :2] == -torch.inf).all()
    assert not dq[:2].any()
    assert not dk[:3].any()
    assert not dv[:3].any()
    assert out[2:].all()
    assert dq[2:].any()
    arguments = good()
    alone = call(
        backend,
        query=arguments["query"][2:5],
        key=arguments["key"][3:7],
        value=arguments["value"][3:7],
        cu_seqlens_q=ints(0, 3),
        cu_seqlens_k=ints(0, 4),
    )
    torch.testing.assert_close(out[2:5], alone[0])


@pytest.mark.parametrize(("rows_q", "rows_k"), [(0, 0), (0, 9), (6, 0)])
def test_nothing_there(backend, rows_q, rows_k):
    """No batch; a batch of empties; queries without keys; keys without queries."""
    arguments = good(query=torch.randn(rows_q, 4, 8), key=torch.randn(rows_k, 2, 8), value=torch.randn(rows_k, 2, 5))
    for cu_q, cu_k in ((ints(0), ints(0)), (ints(0, 0, 0), ints(0, 0, 0)), (ints(0, rows_q), ints(0, rows_k))):
        out, lse, *grads = call(backend, **{**arguments, "cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k})
        assert out.shape == (rows_q, 4, 5)
        assert lse.shape == (4, rows_q)
        assert not out.any()
        assert (lse == -torch.inf).all()
        assert not any(g.any() for g in grads)


def test_max_seqlen_is_only_a_hint(backend):
    plain = fastxattn.varlen_cross_attention(**good(), backend=backend)
    for hint in (0, 1, 10**6):
        assert torch.equal(plain, fastxattn.varlen_cross_attention(*good().values(), hint, hint, backend=backend))


def test_rows_whose_every_score_is_minus_infinity(backend):
    """Hidden by the bias alone: still 0, -inf and zero gradients, of the bias too."""
    key_bias = torch.zeros(9)
    key_bias[:4] = -torch.inf
    key_bias.requires_grad_()
    query = good()["query"].requires_grad_()
    out, lse = fastxattn.varlen_cross_attention(
        **good(query=query, key_bias=key_bias), return_lse=True, backend=backend
    )
    assert not out[:2].any()
    assert (lse[:, :2] == -torch.inf).all()
    d_query, d_bias = torch.autograd.grad((out, lse), (query, key_bias), (torch.ones_like(out), torch.ones_like(lse)))
    assert not d_query[:2].any()
    assert not d_bias[:4].any()
    assert d_query.isfinite().all()
    assert d_bias.isfinite().all()


BAD_RANGES = {  # by sequence, of 4 and of 5 keys
    "negative": ([[-1, 2], [0, 4], [0, 5], [0, 5], [0, 5], [0, 5]], "4; got [-1, 2) at query row 0"),
    "past the end": ([[0, 4], [0, 5], [0, 5], [0, 5], [0, 5], [0, 5]], "4; got [0, 5) at query row 1"),
    "past the last": ([[0, 4], [0, 4], [0, 5], [0, 5], [0, 5], [3, 6]], "5; got [3, 6) at query row 5"),
    "reversed": ([[0, 4], [0, 4], [3, 1], [0, 5], [0, 5], [0, 5]], "5; got [3, 1) at query row 2"),
    "huge": ([[0, 2**31 - 1], *[[0, 4]] * 5], "4; got [0, 2147483647) at query row 0"),
}


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("name", BAD_RANGES)
def test_ranges_outside_the_sequence(backend, name, requires_grad):
    """Refused with the rule, the range and its row; so is the same in the padded layout."""
    ranges, message = BAD_RANGES[name]
    ranges = torch.tensor(ranges, dtype=torch.int32)
    arguments = good(kv_range=ranges)
    arguments["query"].requires_grad_(requires_grad)
    rule = "kv_range must satisfy 0 <= start <= end <= the keys of the sequence, "
    with pytest.raises(ValueError, match=re.escape(rule + message)):
        fastxattn.varlen_cross_attention(**arguments, backend=backend)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("wrong", [[-1, 3], [2, 6], [4, 1]])
def test_padded_ranges_outside_the_axis(backend, masked, wrong):
    query, key = torch.randn(2, 3, 4, 8), torch.randn(2, 5, 4, 8)
    ranges = torch.tensor([[0, 5], wrong, [5, 5]], dtype=torch.int32)
    mask = torch.tensor([[True] * 5, [True, False, True, True, True]]) if masked else None
    with pytest.raises(ValueError, match="kv_range must satisfy 0 <= start <= end <= the keys of the sequence"):
        fastxattn.cross_attention(query, key, key, key_mask=mask, kv_range=ranges, backend=backend)


def test_ranges_of_nobody_and_of_nothing(backend):
    """Rows that belong to no sequence may hold anything; start == end sees nothing, at either end too."""
    ranges = torch.tensor([[0, 0], [4, 4], [2, 2], [1, 3], [-7, 99], [9, 2]], dtype=torch.int32)
    out, *_ = call(backend, **good(kv_range=ranges, cu_seqlens_q=ints(0, 2, 4)))
    assert not out[[0, 1, 2, 4, 5]].any()
    assert out[3].any()


def test_strides(backend):
    """Transposed, expanded and sliced inputs, and offsets with holes, give what their copies give."""
    big = torch.randn(8, 6, 40)
    query = big.transpose(0, 1)[:, ::2, 5:37:4]  # last axis not contiguous
    key = torch.randn(1, 1, 8).expand(9, 2, 8)
    value = torch.randn(9, 4, 20)[:, 1:3, 7:12]
    holes = {"cu_seqlens_q": ints(0, 9, 2, 9, 6)[::2], "kv_range": torch.tensor([[0, 9, 4, 9]] * 6).int()[:, ::2]}
    strided = call(backend, **good(query=query, key=key, value=value, **holes))
    copies = {name: t.contiguous() for name, t in {"query": query, "key": key, "value": value, **holes}.items()}
    for a, b in zip(strided, call(backend, **good(**copies)), strict=True):
        torch.testing.assert_close(a, b)


def test_expanded_cotangents(backend):
    """Gradients that arrive as expanded scalars, as from sum() and mean()."""
    arguments = good()
    query = arguments.pop("query").requires_grad_()
    out = fastxattn.varlen_cross_attention(query, **arguments, backend=backend)
    expanded = torch.autograd.grad(out, query, torch.ones(()).expand_as(out), retain_graph=True)[0]
    torch.testing.assert_close(expanded, torch.autograd.grad(out, query, torch.ones_like(out))[0])


def test_key_bias_in_other_precisions(backend):
    bias = torch.randn(9)
    wanted = fastxattn.varlen_cross_attention(**good(key_bias=bias.bfloat16().float()), backend=backend)
    assert torch.equal(wanted, fastxattn.varlen_cross_attention(**good(key_bias=bias.bfloat16()), backend=backend))


def test_a_key_may_be_selected_twice(backend):
    """Two sequences share their keys; gradients add up."""
    arguments = good(key_index=ints(0, 1, 2, 3, 3, 2, 1, 0, 8))
    out, _, _, dk, dv = call(backend, **arguments)
    rows = arguments["key_index"].long()
    gathered = call(backend, **good(key=arguments["key"][rows], value=arguments["value"][rows]))
    torch.testing.assert_close(out, gathered[0])
    torch.testing.assert_close(dk, torch.zeros_like(dk).index_add(0, rows, gathered[3]))
    torch.testing.assert_close(dv, torch.zeros_like(dv).index_add(0, rows, gathered[4]))


def test_seventy_thousand_sequences():
    """More sequences than a 16-bit grid axis holds."""
    n, g = 70_000, torch.Generator().manual_seed(0)
    lengths_q, lengths_k = torch.randint(0, 3, (n,), generator=g), torch.randint(0, 4, (n,), generator=g)
    cu_q, cu_k = (torch.nn.functional.pad(t.cumsum(0), (1, 0)).int() for t in (lengths_q, lengths_k))
    query = torch.randn(int(cu_q[-1]), 1, 4, generator=g)
    key, value = torch.randn(2, int(cu_k[-1]), 1, 4, generator=g)
    found = call("auto", query=query, key=key, value=value, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k)
    for b in (0, 1, 34_567, 65_535, 65_536, n - 1):
        q, k = slice(int(cu_q[b]), int(cu_q[b + 1])), slice(int(cu_k[b]), int(cu_k[b + 1]))
        offsets = {"cu_seqlens_q": ints(0, q.stop - q.start), "cu_seqlens_k": ints(0, k.stop - k.start)}
        wanted = call("reference", query=query[q], key=key[k], value=value[k], **offsets)
        for name, a, b_ in zip(
            ("out", "dq", "dk", "dv"),
            (found[0][q], found[2][q], found[3][k], found[4][k]),
            (wanted[0], *wanted[2:]),
            strict=True,
        ):
            torch.testing.assert_close(a, b_, msg=name)


def test_one_long_sequence_among_many_of_one():
    """65 536 keys in the middle of 10 000 sequences of one."""
    n, long, g = 10_001, 65_536, torch.Generator().manual_seed(0)
    lengths = torch.ones(n, dtype=torch.int64)
    lengths[5000] = long
    cu_q = torch.arange(n + 1, dtype=torch.int32)
    cu_k = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
    query = torch.randn(n, 2, 8, generator=g)
    key, value = torch.randn(2, int(cu_k[-1]), 2, 8, generator=g)
    out, lse, *_ = call("auto", query=query, key=key, value=value, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k)
    ones = torch.cat([torch.arange(5000), torch.arange(5001, n)])
    torch.testing.assert_close(out[ones], value[cu_k.long()[ones]])  # one key: its value
    at = slice(5000, 5000 + long)
    wanted = call(
        "reference",
        query=query[5000:5001].double(),
        key=key[at].double(),
        value=value[at].double(),
        cu_seqlens_q=ints(0, 1),
        cu_seqlens_k=ints(0, long),
    )
    torch.testing.assert_close(out[5000:5001].double(), wanted[0], rtol=0, atol=1e-6)
    torch.testing.assert_close(lse[:, 5000:5001].double(), wanted[1], rtol=1e-6, atol=0)


def test_more_than_two_to_the_31_elements():
    """Shapes only, through fake tensors: 2^32 elements of query and of key."""
    if reason := native.cpu_library().reason:
        pytest.skip(reason)
    with FakeTensorMode():
        rows = 2**24
        query, key = torch.empty(rows, 4, 64), torch.empty(rows, 4, 64)
        value = torch.empty(rows, 4, 128, requires_grad=True)
        cu = torch.empty(3, dtype=torch.int32)
        out, lse = fastxattn.varlen_cross_attention(query, key, value, cu, cu, return_lse=True)
        assert out.shape == (rows, 4, 128)
        assert lse.shape == (4, rows)
        assert lse.dtype == torch.float32
        out.sum().backward()
        assert value.grad.shape == value.shape


@pytest.mark.skipif(bool(native.cpu_library().reason), reason="needs the CPU kernels")
def test_offsets_past_two_to_the_31_elements():
    """Rows 2^31 elements apart, in memory that is only touched where they lie."""
    heads, dim, stride = 1, 8, 2**30
    try:
        storage = torch.empty(3 * stride + dim, dtype=torch.bfloat16)  # 6 GiB of address space, three pages of memory
    except RuntimeError:
        pytest.skip("this machine does not hand out 6 GiB of address space")
    rows = storage.as_strided((4, heads, dim), (stride, dim, 1))
    small = torch.randn(4, heads, dim).bfloat16()
    rows.copy_(small)
    assert rows.stride(0) * 3 > 2**31
    out = fastxattn.varlen_cross_attention(rows, rows, rows, ints(0, 1, 4), ints(0, 1, 4), backend="cpu")
    wanted = fastxattn.varlen_cross_attention(small, small, small, ints(0, 1, 4), ints(0, 1, 4), backend="cpu")
    assert torch.equal(out, wanted)


def test_errors_of_the_machine_are_raised_as_they_are(monkeypatch):
    """Sound arguments that the operator could not serve are not computed a second time."""
    calls = []

    def out_of_memory(*arguments):
        calls.append(arguments)
        raise RuntimeError("out of memory")

    arguments = good()
    fastxattn.varlen_cross_attention(**arguments)
    monkeypatch.setattr("fastxattn.ops.attention.backends.direct", out_of_memory)
    with pytest.raises(RuntimeError, match="out of memory"):
        fastxattn.varlen_cross_attention(**arguments)
    assert len(calls) == 1
    monkeypatch.undo()
    assert fastxattn.varlen_cross_attention(**arguments, scale=1).shape == (6, 4, 5)
