"""PackedTokens: conversions and back, gradients, pytree, checks."""

import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils import _pytree as pytree

from fastxattn import PackedTokens

MASK = torch.tensor([[True, False, True], [False, False, False], [True, True, True]])


def ints(*values):
    return torch.tensor(values, dtype=torch.int32)


def test_from_padded_takes_any_pattern():
    values = torch.arange(18.0).reshape(3, 3, 2)
    tokens = PackedTokens.from_padded(values, MASK)
    assert tokens.cu_seqlens.tolist() == [0, 2, 2, 5]
    assert tokens.cu_seqlens.dtype == torch.int32
    assert tokens.max_seqlen == 3
    assert torch.equal(tokens.values, torch.stack([values[0, 0], values[0, 2], *values[2]]))
    assert tokens.lengths.tolist() == [2, 0, 3]
    assert tokens.batch_size == 3
    assert tokens.sequence_ids().tolist() == [0, 0, 2, 2, 2]
    assert tokens.positions().tolist() == [0, 1, 0, 1, 2]


def test_from_padded_without_a_mask():
    tokens = PackedTokens.from_padded(torch.randn(3, 4, 2))
    assert tokens.cu_seqlens.tolist() == [0, 4, 8, 12]


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int32, torch.int64, torch.float16, torch.complex64])
def test_padding_keeps_the_dtype(dtype):
    tokens = PackedTokens(torch.ones(3).to(dtype), ints(0, 1, 3), 2)
    padded, _ = tokens.to_padded()
    assert padded.dtype == dtype
    assert padded.tolist() == [[1, 0], [1, 1]]


def test_to_padded():
    tokens = PackedTokens.from_padded(torch.arange(18.0).reshape(3, 3, 2), MASK)
    padded, mask = tokens.to_padded(fill=-1, length=4)
    assert padded.shape == (3, 4, 2)
    assert mask.tolist() == [[True, True, False, False], [False] * 4, [True, True, True, False]]
    assert torch.equal(padded[mask], tokens.values)
    assert (padded[~mask] == -1).all()


def test_to_padded_keeps_nan_where_it_is():
    tokens = PackedTokens.from_list([torch.full((1, 2), float("nan")), torch.ones(2, 2)])
    padded, _ = tokens.to_padded()
    assert padded[0, 0].isnan().all()
    assert padded.isnan().sum() == 2
    assert not PackedTokens(torch.full((2, 3), torch.nan), ints(0, 0), 2).to_padded()[0].any()


@given(st.lists(st.integers(0, 5), min_size=1, max_size=6))
@settings(max_examples=40, deadline=None)
def test_round_trips(lengths):
    parts = [torch.randn(n, 2, 3) for n in lengths]
    tokens = PackedTokens.from_list(parts)
    assert all(torch.equal(a, b) for a, b in zip(tokens.to_list(), parts, strict=True))
    again = PackedTokens.from_padded(*tokens.to_padded())
    assert torch.equal(again.values, tokens.values)
    assert torch.equal(again.cu_seqlens, tokens.cu_seqlens)
    nested = PackedTokens.from_nested(tokens.to_nested())
    assert torch.equal(nested.values, tokens.values)
    assert torch.equal(nested.cu_seqlens, tokens.cu_seqlens)
    assert nested.max_seqlen == max(lengths)
    ids = [b for b, n in enumerate(lengths) for _ in range(n)]
    assert tokens.sequence_ids().tolist() == ids


def test_gradients_flow_through_conversions():
    values = torch.randn(3, 3, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda v: PackedTokens.from_padded(v, MASK).values, values)
    rows = torch.randn(7, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda v: PackedTokens(v, ints(0, 2, 2, 5), 3).to_padded()[0], rows)
    assert torch.autograd.gradcheck(lambda v: PackedTokens(v, ints(0, 2, 7), 5).to_nested().values(), rows)


def test_rows_beyond_the_last_sequence():
    tokens = PackedTokens(torch.arange(5.0), ints(0, 1, 3), 2)
    assert tokens.sequence_ids().tolist() == [0, 1, 1, 2, 2]
    assert [t.tolist() for t in tokens.to_list()] == [[0.0], [1.0, 2.0]]
    assert tokens.to_padded()[0].tolist() == [[0.0, 0.0], [1.0, 2.0]]


def test_no_sequences():
    tokens = PackedTokens(torch.randn(0, 4), ints(0), 0)
    assert tokens.batch_size == 0
    assert tokens.to_list() == []
    assert tokens.to_padded()[0].shape == (0, 0, 4)


def test_pytree():
    tokens = PackedTokens(torch.randn(3, 2), ints(0, 1, 3), 2)
    leaves, spec = pytree.tree_flatten(tokens)
    assert leaves[2] == 2
    again = pytree.tree_unflatten(leaves, spec)
    assert isinstance(again, PackedTokens)
    doubled = pytree.tree_map_only(torch.Tensor, lambda t: t * 2, {"a": tokens})["a"]
    assert torch.equal(doubled.values, tokens.values * 2)
    named = dict(pytree.tree_flatten_with_path(tokens)[0])
    assert [str(path[0]) for path in named] == [".values", ".cu_seqlens", ".max_seqlen"]


def test_with_values():
    tokens = PackedTokens(torch.randn(3, 2), ints(0, 1, 3), 2)
    other = tokens.with_values(torch.zeros(3, 7, 1))
    assert other.values.shape == (3, 7, 1)
    assert other.cu_seqlens is tokens.cu_seqlens
    with pytest.raises(ValueError, match="values must have the 3 rows they replace; got 2"):
        tokens.with_values(torch.zeros(2, 7))


VALUES = torch.zeros(4, 2)
BAD = {
    "values": (TypeError, ([1], ints(0, 1), 1), "values must be a tensor; got list"),
    "scalar": (ValueError, (torch.tensor(1.0), ints(0), 1), "values must have at least one axis"),
    "int64": (TypeError, (VALUES, ints(0, 1).long(), 1), "cu_seqlens must be int32; got torch.int64"),
    "shape": (ValueError, (VALUES, ints(0, 1)[None], 1), r"cu_seqlens must have shape \(batch \+ 1,\); got \(1, 2\)"),
    "none": (ValueError, (VALUES, ints(), 1), r"cu_seqlens must have shape \(batch \+ 1,\); got \(0,\)"),
    "device": (
        ValueError,
        (VALUES, ints(0, 1).to("meta"), 1),
        "cu_seqlens must be on the device of values, cpu; got meta",
    ),
    "start": (ValueError, (VALUES, ints(1, 2), 1), "cu_seqlens must start at 0; got 1"),
    "decrease": (ValueError, (VALUES, ints(0, 3, 2), 3), "cu_seqlens must not decrease; got 3 then 2 at sequence 1"),
    "end": (ValueError, (VALUES, ints(0, 5), 5), "cu_seqlens must end within the 4 rows of values; got 5"),
    "no int": (TypeError, (VALUES, ints(0, 1), None), "max_seqlen must be an int; got NoneType"),
    "NaN": (TypeError, (VALUES, ints(0, 1), float("nan")), "max_seqlen must be an int; got float"),
    "tensor": (TypeError, (VALUES, ints(0, 1), torch.tensor(1)), "max_seqlen must be an int; got Tensor"),
    "bool": (TypeError, (VALUES, ints(0, 1), True), "max_seqlen must be an int; got bool"),
    "negative": (ValueError, (VALUES, ints(0), -1), "max_seqlen must not be negative; got -1"),
    "longest": (ValueError, (VALUES, ints(0, 1, 4), 2), "max_seqlen must be at least the longest length, 3; got 2"),
}


@pytest.mark.parametrize("name", BAD)
def test_checks(name):
    error, arguments, message = BAD[name]
    with pytest.raises(error, match=message):
        PackedTokens(*arguments)


def test_conversion_checks():
    with pytest.raises(TypeError, match=r"mask must be boolean, True = valid token; got torch.float32"):
        PackedTokens.from_padded(torch.zeros(2, 3, 4), torch.ones(2, 3))
    with pytest.raises(ValueError, match=r"mask must have shape \(batch, length\), \(2, 3\); got \(2, 4\)"):
        PackedTokens.from_padded(torch.zeros(2, 3, 4), torch.ones(2, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match="length must hold the longest sequence, 3; got 2"):
        PackedTokens(VALUES, ints(0, 1, 4), 3).to_padded(length=2)
    for length, error in ((1.5, TypeError), (True, TypeError), (-1, ValueError)):
        with pytest.raises(error, match="length must"):
            PackedTokens(VALUES, ints(0), 0).to_padded(length=length)
    with pytest.raises(TypeError, match="values must be a tensor; got list"):
        PackedTokens.from_padded([[1.0]])
    with pytest.raises(TypeError, match="mask must be a tensor; got list"):
        PackedTokens.from_padded(torch.zeros(1, 1), [[True]])
    with pytest.raises(ValueError, match="mask must be on the device of its tokens, cpu; got meta"):
        PackedTokens.from_padded(torch.zeros(1, 1), torch.ones(1, 1, dtype=torch.bool, device="meta"))
    for tensors, error, message in (
        ([], ValueError, "at least one tensor"),
        ([1], TypeError, "got int"),
        ([torch.tensor(1.0)], TypeError, r"tensors must hold tensors of shape \(length, ...\); got \(\)"),
        ([VALUES, VALUES.half()], ValueError, "tensors must have one dtype; got torch.float32 and torch.float16"),
        ([VALUES, VALUES.to("meta")], ValueError, "tensors must have one device; got cpu and meta"),
        ([VALUES, VALUES[:, :1]], ValueError, r"one shape but for the rows; got \(4, 2\) and \(4, 1\)"),
    ):
        with pytest.raises(error, match=message):
            PackedTokens.from_list(tensors)
    with pytest.raises(TypeError, match=r"nested must be a torch.nested tensor; got \(2, 3\)"):
        PackedTokens.from_nested(torch.zeros(2, 3))
    with pytest.raises(TypeError, match=r"nested must be a torch.nested tensor; got list"):
        PackedTokens.from_nested([torch.zeros(2, 3)])


# Nested tensors ------------------------------------------------------------------------------------------------


def jagged(*parts):
    return torch.nested.nested_tensor(list(parts), layout=torch.jagged)


@pytest.mark.parametrize("axes", [(1, 2), (1, 3), (1, 2, 2, 3)])
def test_a_transposed_nested_tensor_gives_its_own_tokens(axes):
    parts = [torch.randn(n, 4, 5) for n in (2, 0, 3)]
    nested = jagged(*parts)
    for a, b in zip(axes[::2], axes[1::2], strict=True):
        nested = nested.transpose(a, b)
        parts = [t.unsqueeze(0).transpose(a, b).squeeze(0) for t in parts]
    ragged = nested._ragged_idx - 1
    tokens = PackedTokens.from_nested(nested)
    assert tokens.cu_seqlens.tolist() == [0, 2, 2, 5]
    assert all(torch.equal(a, b.movedim(ragged, 0)) for a, b in zip(tokens, parts, strict=True))


def test_the_values_of_a_jagged_tensor_of_other_axis():
    values = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)

    def rows(v):
        nested = torch.nested.nested_tensor_from_jagged(v, torch.tensor([0, 2, 6]), jagged_dim=2)
        return PackedTokens.from_nested(nested).values

    assert torch.equal(rows(values), values.T)
    assert torch.autograd.gradcheck(rows, values)


def test_nested_tensors_without_a_packed_form_are_refused():
    holes = torch.nested.narrow(
        torch.randn(3, 5, 2), 1, torch.tensor([0, 1, 2]), torch.tensor([2, 2, 3]), layout=torch.jagged
    )
    with pytest.raises(ValueError, match=r"must have no holes between its sequences; call .contiguous\(\)"):
        PackedTokens.from_nested(holes)
    again = PackedTokens.from_nested(holes.contiguous())
    assert all(torch.equal(a, b) for a, b in zip(again, holes.unbind(), strict=True))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, about a prototype
        strided = torch.nested.nested_tensor([torch.randn(2, 3), torch.randn(1, 3)], layout=torch.strided)
    with pytest.raises(TypeError, match=r"must have layout torch.jagged; got torch.strided: convert it with torch"):
        PackedTokens.from_nested(strided)
    advice = torch.nested.as_nested_tensor(list(strided.unbind()), layout=torch.jagged)
    assert PackedTokens.from_nested(advice).cu_seqlens.tolist() == [0, 2, 3]


def test_nested_tensors_of_no_sequences_and_of_spare_rows():
    none = PackedTokens(torch.randn(0, 4), ints(0), 0)
    assert PackedTokens.from_nested(none.to_nested()) == none
    spare = PackedTokens(torch.arange(5.0)[:, None], ints(0, 1, 3), 2)
    assert [t.flatten().tolist() for t in spare.to_nested().unbind()] == [[0.0], [1.0, 2.0]]
