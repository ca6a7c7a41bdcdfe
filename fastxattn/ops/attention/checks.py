"""Validation of an attention call.

:func:`check_shapes` looks at types, dtypes, shapes and devices only; it also runs on fake tensors while a graph is
traced, so a comparison of sizes may be symbolic. :func:`check_contents` reads offsets and indices. The fast path of an
eager CPU call runs neither: the native operator has checks of its own, and these explain what it refuses.

``kv_range`` must stay within its sequence: 0 <= start <= end <= keys, for every query token in use. A GPU could not
refuse it without waiting for the device: there it is clamped, unless ``FASTXATTN_VALIDATE=1``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastxattn.ops import checks
from fastxattn.ops.attention.problem import Problem
from fastxattn.ops.checks import (
    FLOATS,
    check_floats,
    check_int32,
    check_key_bias,
    check_numbers,
    check_tensor,
    check_value,
    check_wide,
)


def _shape(t: Tensor) -> str:
    return f"({', '.join(str(n) for n in t.shape)}{',' if t.ndim == 1 else ''})"


def check_shapes(problem: Problem) -> None:
    """Types, dtypes, shapes, devices and numbers.

    Raises:
        TypeError: something is not a tensor or a number, or has the wrong dtype.
        ValueError: a shape, device or number is wrong.
    """
    _check_tokens(problem)
    _check_offsets(problem)
    _check_biases(problem)
    check_numbers(problem)
    _check_seed(problem)


def _check_tokens(problem: Problem) -> None:
    query, key, value = problem.query, problem.key, problem.value
    for name, t in (("query", query), ("key", key), ("value", value)):
        check_tensor(name, t, query)
        check_floats(name, t, query)
        if t.ndim != 3:
            dims = "value_dim" if name == "value" else "head_dim"
            raise ValueError(f"{name} must have shape (tokens, heads, {dims}); got {_shape(t)}")
        check_value(
            t.shape[1] >= 1 and t.shape[2] >= 1, f"{name} must have at least 1 head and 1 channel; got {_shape(t)}"
        )
    check_value(
        key.shape[2] == query.shape[2],
        f"key must have the head_dim of query, {query.shape[2]}; got {key.shape[2]} in shape {_shape(key)}",
    )
    check_value(
        value.shape[0] == key.shape[0], f"value must have as many tokens as key, {key.shape[0]}; got {value.shape[0]}"
    )
    check_value(
        value.shape[1] == key.shape[1], f"value must have as many heads as key, {key.shape[1]}; got {value.shape[1]}"
    )
    check_value(
        query.shape[1] % key.shape[1] == 0,
        f"the heads of key must divide the heads of query, {query.shape[1]}; got {key.shape[1]}",
    )


def _check_offsets(problem: Problem) -> None:
    query, batch = problem.query, -1
    for name in ("cu_seqlens_q", "cu_seqlens_k", "seqused_q", "seqused_k", "query_index", "key_index"):
        t = getattr(problem, name)
        if t is None and not name.startswith("cu_"):
            continue
        check_tensor(name, t, query)
        check_int32(name, t)
        if t.ndim != 1:
            raise ValueError(f"{name} must have one axis; got shape {_shape(t)}")
        if name == "cu_seqlens_q":
            check_value(t.shape[0] >= 1, "cu_seqlens_q must have shape (batch + 1,), at least one offset; got none")
            batch = t.shape[0] - 1
        elif name == "cu_seqlens_k":
            check_value(
                t.shape[0] == batch + 1,
                f"cu_seqlens_k must have as many offsets as cu_seqlens_q, {batch + 1}; got {t.shape[0]}",
            )
        elif name.startswith("seqused"):
            check_value(t.shape[0] == batch, f"{name} must have shape (batch,), ({batch},); got {_shape(t)}")
    ranges = problem.kv_range
    if ranges is not None:
        check_tensor("kv_range", ranges, query)
        check_int32("kv_range", ranges)
        if ranges.ndim != 2:
            raise ValueError(f"kv_range must have shape (query tokens, 2); got {_shape(ranges)}")
        check_value(
            ranges.shape[0] == query.shape[0] and ranges.shape[1] == 2,
            f"kv_range must have shape (query tokens, 2), ({query.shape[0]}, 2); got {_shape(ranges)}",
        )


def _check_biases(problem: Problem) -> None:
    query, key = problem.query, problem.key
    key_bias, bias = problem.key_bias, problem.bias
    if key_bias is not None:
        check_tensor("key_bias", key_bias, query)
        check_wide("key_bias", key_bias, query)
        check_key_bias("key_bias", key_bias, key.shape[0], query.shape[1])
    if bias is not None:
        check_tensor("bias", bias, query)
        if bias.dtype not in FLOATS or (bias.dtype == torch.float64) != (query.dtype == torch.float64):
            raise TypeError(f"bias must be float32 or of the dtype of query, {query.dtype}; got {bias.dtype}")
        if bias.ndim != 4:
            raise ValueError(f"bias must broadcast to (batch, heads, queries, keys); got shape {_shape(bias)}")
        for axis, (name, size) in enumerate((("batch", problem.batch), ("heads", query.shape[1]))):
            check_value(
                bias.shape[axis] == 1 or bias.shape[axis] == size,
                f"axis {axis} of bias must be 1 or the {name}, {size}; got shape {_shape(bias)}",
            )


def _check_seed(problem: Problem) -> None:
    seed = problem.dropout_seed
    if problem.dropout_p and seed is not None:
        check_tensor("dropout_seed", seed, problem.query)
        if seed.dtype != torch.int64:
            raise TypeError(f"dropout_seed must be an int or an int64 tensor; got {seed.dtype}")
        check_value(seed.numel() == 1, f"dropout_seed must hold one number; got shape {_shape(seed)}")


def check_contents(problem: Problem) -> None:
    """Offsets, lengths and indices themselves. Reads them: on a GPU this waits for the device.

    Raises:
        ValueError: offsets do not start at 0, decrease or end past the tokens; a length or an index is out of range;
            a query token is named twice; a range leaves its sequence; the bias is too small for the sequences.
    """
    owners: list[tuple[Tensor, Tensor]] = []  # by side: the rows in use, and the sequence of each
    for side, tokens, axis in (("q", problem.query, 2), ("k", problem.key, 3)):
        offsets_name = f"cu_seqlens_{side}"
        offsets: Tensor = getattr(problem, offsets_name)
        used: Tensor | None = getattr(problem, f"seqused_{side}")
        index_name = "query_index" if side == "q" else "key_index"
        index: Tensor | None = getattr(problem, index_name)
        slots, what = (tokens, "tokens") if index is None else (index, f"entries of {index_name}")
        checks.check_contents(offsets_name, offsets, slots.shape[0], what)
        lengths = offsets.diff()
        if used is not None and bool(((used < 0) | (used > lengths)).any()):
            at = int(((used < 0) | (used > lengths)).nonzero()[0])
            raise ValueError(
                f"seqused_{side} must lie between 0 and the sequence's length, {int(lengths[at])}; "
                f"got {int(used[at])} at sequence {at}"
            )
        in_use = lengths if used is None else used
        used_slots = _slots_in_use(offsets, in_use)
        rows = used_slots if index is None else index[used_slots].long()
        if side == "k" and problem.kv_range is not None:
            _check_ranges(problem.kv_range, *owners[0], in_use)
        owners.append((rows, torch.repeat_interleave(torch.arange(in_use.shape[0], device=rows.device), in_use)))
        if index is not None and rows.numel():
            low, high = int(rows.min()), int(rows.max())
            if low < 0 or high >= tokens.shape[0]:
                wrong = low if low < 0 else high
                raise ValueError(f"{index_name} must lie between 0 and {tokens.shape[0] - 1}; got {wrong}")
            if side == "q" and rows.unique().numel() < rows.numel():
                raise ValueError("query_index must name each query token at most once; got one twice")
        if problem.bias is not None and problem.bias.shape[axis] > 1 and rows.numel():
            place = rows - offsets[torch.searchsorted(offsets, used_slots, right=True, out_int32=True) - 1]
            if int(place.min()) < 0 or int(place.max()) >= problem.bias.shape[axis]:
                raise ValueError(
                    f"axis {axis} of bias must be 1 or hold every token of a sequence, up to {int(place.max()) + 1}; "
                    f"got shape {_shape(problem.bias)}"
                )


def _check_ranges(ranges: Tensor, rows: Tensor, sequences: Tensor, keys: Tensor) -> None:
    """That the ranges of ``rows``, which belong to ``sequences``, lie within those sequences' numbers of keys."""
    start, end = ranges[rows].unbind(1)
    wrong = (start < 0) | (start > end) | (end > keys[sequences])
    if bool(wrong.any()):
        at = int(wrong.nonzero()[0])
        raise ValueError(
            f"kv_range must satisfy 0 <= start <= end <= the keys of the sequence, {int(keys[sequences[at]])}; "
            f"got [{int(start[at])}, {int(end[at])}) at query row {int(rows[at])}"
        )


def _slots_in_use(offsets: Tensor, used: Tensor) -> Tensor:
    """The slots in use, int64, sequence by sequence."""
    starts = torch.repeat_interleave(offsets[:-1].long() - (used.long().cumsum(0) - used), used.long())
    return torch.arange(starts.shape[0], device=offsets.device) + starts
