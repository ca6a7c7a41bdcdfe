"""Arguments that no operation takes, refused by name: layouts, dtypes and numbers beyond float32."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fastxattn as fx
from fastxattn.ops.pruning import gather_rows, merge_rows
from tests.compositions.problem import Problem
from tests.compositions.rows import BY_NAME

FIRST = {
    "varlen_cross_attention": "query",
    "cross_attention, masks, bias": "query",
    "co_attention": "query_a",
    "absorbed_attention": "query",
    "key_importance": "query",
    "infonce_loss": "a",
    "sigmoid_loss": "a",
    "sigmoid_loss, none": "a",
    "maxsim": "a",
    "late_interaction_loss": "a",
}
"""The first argument of operations, by row of the composition table."""
LOSSES = dict.fromkeys(("infonce_loss", "sigmoid_loss", "sigmoid_loss, none"), "image_features")
"""What these call it, where the table has another name."""
LAYOUTS = {
    "sparse": Tensor.to_sparse,
    "mkldnn": Tensor.to_mkldnn,
    "jagged": lambda t: torch.nested.as_nested_tensor([t[:1], t[1:]], layout=torch.jagged),
}
DTYPES = {
    "quantised": lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8),
    "float8": lambda t: t.to(torch.float8_e4m3fn),
    "int8": Tensor.char,
    "complex": lambda t: t * 1j,
}


@pytest.mark.parametrize("change", LAYOUTS)
@pytest.mark.parametrize("row", FIRST)
def test_layouts(row: str, change: str) -> None:
    problem = Problem(BY_NAME[row])
    inputs = problem.copied()
    inputs[FIRST[row]] = LAYOUTS[change](inputs[FIRST[row]])
    with pytest.raises(TypeError, match=rf"{LOSSES.get(row, FIRST[row])} must be a dense tensor; got one of torch\."):
        problem(inputs)


@pytest.mark.parametrize("change", DTYPES)
@pytest.mark.parametrize("row", FIRST)
def test_dtypes(row: str, change: str) -> None:
    problem = Problem(BY_NAME[row])
    inputs = problem.copied()
    inputs[FIRST[row]] = DTYPES[change](inputs[FIRST[row]])
    # co-attention checks dtypes as attention does
    with pytest.raises(TypeError, match=rf"({LOSSES.get(row, FIRST[row])}|query) must be float.*; got torch\."):
        problem(inputs)


@pytest.mark.parametrize("move", [gather_rows, lambda x, index: merge_rows(x, index, None, 3)], ids=["gather", "merge"])
def test_rows_that_are_no_dense_tensor(move: Callable[..., Tensor]) -> None:
    rows, index = torch.randn(3, 4), torch.zeros(3, dtype=torch.int32)
    with pytest.raises(TypeError, match=r"x must be a dense tensor; got one of torch\.sparse_coo"):
        move(rows.to_sparse(), index)
    with pytest.raises(TypeError, match="x must be a tensor; got ndarray"):
        move(rows.numpy(), index)
    with pytest.raises(TypeError, match="must be a tensor; got list"):
        move(rows, [0, 0, 0])


NUMBERS: dict[str, Callable[[dict[str, Tensor], Any], Any]] = {
    "scale": lambda x, n: fx.varlen_cross_attention(x["q"], x["q"], x["q"], x["cu"], x["cu"], scale=n),
    "softcap": lambda x, n: fx.varlen_cross_attention(x["q"], x["q"], x["q"], x["cu"], x["cu"], softcap=n),
    "dropout_p": lambda x, n: fx.varlen_cross_attention(x["q"], x["q"], x["q"], x["cu"], x["cu"], dropout_p=n),
    "scale, co-attention": lambda x, n: fx.co_attention(*[x["q"]] * 4, x["cu"], x["cu"], scale=n),
    "scale, absorbed": lambda x, n: fx.absorbed_attention(x["q"], x["a"], x["cu"], x["cu"], scale=n),
    "scale, importance": lambda x, n: fx.key_importance(x["q"], x["q"], x["lse"], x["cu"], x["cu"], scale=n),
    "logit_scale": lambda x, n: fx.infonce_loss(x["a"], x["a"], n),
    "logit_bias": lambda x, n: fx.sigmoid_loss(x["a"], x["a"], 1.0, n),
    "logit_scale, tokens": lambda x, n: fx.late_interaction_loss(x["a"], x["a"], x["cu"], x["cu"], n),
}


@pytest.mark.parametrize("number", [1e300, 10**400], ids=["1e300", "10**400"])
@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_beyond_float32(name: str, number: float) -> None:
    """In the first call of a process and in later ones: they would be infinite inside the kernels."""
    inputs = {
        "q": torch.randn(6, 2, 8),
        "a": torch.randn(6, 8),
        "lse": torch.ones(2, 6),
        "cu": torch.tensor([0, 2, 6], dtype=torch.int32),
    }
    NUMBERS[name](inputs, 0.5)
    with pytest.raises(ValueError, match=f"{name.partition(',')[0]} must be finite"):
        NUMBERS[name](inputs, number)


RANGES: dict[str, Callable[[Tensor, Tensor, Any], Any]] = {
    "attention": lambda q, cu, r: fx.varlen_cross_attention(q, q, q, cu, cu, kv_range=r),
    "importance": lambda q, cu, r: fx.key_importance(q, q, torch.ones(2, 6), cu, cu, kv_range=r),
    "absorbed": lambda q, cu, r: fx.absorbed_attention(q, q[:, 0], cu, cu, scale=1.0, kv_range=r),
}


@pytest.mark.parametrize("name", RANGES)
def test_ranges_of_other_queries(name: str) -> None:
    """After a first call, which makes later ones take the fast path."""
    query, offsets = torch.randn(6, 2, 8), torch.tensor([0, 2, 6], dtype=torch.int32)
    ranges = torch.tensor([[0, 1]] * 7, dtype=torch.int32)
    for _ in range(2):
        RANGES[name](query, offsets, ranges[:6])
    for wrong in (ranges, ranges[:5], ranges[0, 0]):
        with pytest.raises(ValueError, match="kv_range must have shape"):
            RANGES[name](query, offsets, wrong)
    with pytest.raises(TypeError, match="kv_range must be a tensor; got list"):
        RANGES[name](query, offsets, ranges[:6].tolist())
