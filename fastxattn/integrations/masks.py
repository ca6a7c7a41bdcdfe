"""The structure of an attention mask, found without keeping its dense form.

Models hand masks around as dense tensors (batch, heads|1, Lq|1, Lk): boolean (True = sees) or additive (0 = sees,
``finfo.min`` or -inf = does not, anything else is a bias). Nearly all of them have one of two simple structures, which
cost O(tokens) instead of O(Lq Lk): *which keys are valid*, and *which interval of the valid keys each query sees*
(causal, sliding window, the images before a text token, the valid tiles of an image).

Rows without keys: a boolean mask gives zeros. An additive mask means literal arithmetic: ``score + finfo.min`` is the
same number for every key, so such a row averages all values. A row of -inf gives zeros.
"""

from __future__ import annotations

import functools
import weakref
from dataclasses import dataclass, replace

import torch
from torch import Tensor

# Low enough to hide any key, high enough to survive a multiplication by log2(e).
FLOOR = -1e30


@dataclass(frozen=True, eq=False)
class Visible:
    """Which keys each query sees."""

    keys: Tensor | None = None
    """(batch, Lk) boolean, the keys that some query sees; None: all of them."""
    ranges: Tensor | None = None
    """(batch, Lq, 2) int32: each query sees those of ``keys`` in [start, end) of the padded axis; None: all of them."""
    bias: Tensor | None = None
    """(batch|1, heads|1, Lq|1, Lk|1), added to the scores: what has no structure. Then the others are None."""
    uniform: Tensor | None = None
    """(batch, Lq) boolean: queries that average all values, as a query of zeros does. None: there are none."""
    literal: bool = False
    """The bias has rows of finfo.min that differ by head: only torch's own arithmetic does what they say."""

    @property
    def everything(self) -> bool:
        """Whether every query sees every key."""
        return self.keys is None and self.ranges is None and self.bias is None and self.uniform is None

    def packed_ranges(self) -> Tensor | None:
        """(batch * Lq, 2) int32: ``ranges`` counted in valid keys, for packed keys."""
        if self.ranges is None or self.keys is None:
            return None if self.ranges is None else self.ranges.flatten(0, 1)
        before = torch.nn.functional.pad(self.keys.cumsum(1, dtype=torch.int32), (1, 0))
        return before.gather(1, self.ranges.flatten(1).long()).view(-1, 2)


@dataclass(frozen=True, eq=False)
class PackedMask:
    """Stands where a model passes its attention mask while the tensors beside it are packed: (1, total, width).

    Module code between an encoder and its attention works row by row and never looks inside a mask, so packed rows
    and this object travel through unchanged classes, under gradient checkpointing too (tensors stay positional).
    """

    cu_seqlens_k: Tensor
    max_seqlen_k: int
    cu_seqlens_q: Tensor | None = None
    """None: the queries are padded, (batch, Lq, width)."""
    max_seqlen_q: int = 0
    kv_range: Tensor | None = None
    """(total_q, 2) int32, as in :func:`fastxattn.varlen_cross_attention`."""


_memo: dict[int, tuple[weakref.ref[Tensor], tuple[int | bool, ...], Tensor, Visible]] = {}


def recognise(mask: Tensor | None, batch: int, queries: int, keys: int) -> Visible:
    """The structure of ``mask`` for (batch, queries, keys), shared by all layers that get the same mask.

    It is found again where the mask's content is another: writes through NumPy or ``.data`` leave no other trace. A
    dense mask is read only where that costs no device synchronisation (on the CPU, outside a trace); elsewhere
    only masks whose strides show the structure are recognised, and the rest goes as bias.

    Raises:
        ValueError: ``mask`` is not 2-D or 4-D, or does not broadcast to (batch, heads, queries, keys).
    """
    if mask is None:
        return Visible()
    if mask.ndim == 2 and mask.dtype == torch.bool:
        mask = mask[:, None, None, :]
    if mask.ndim != 4:
        raise ValueError(
            f"attention_mask must have 4 axes (batch, heads, queries, keys); got shape {tuple(mask.shape)}"
        )
    for axis, (size, full) in enumerate(zip(mask.shape, (batch, mask.shape[1], queries, keys), strict=True)):
        if size not in (1, full):
            raise ValueError(
                f"attention_mask must broadcast to ({batch}, heads, {queries}, {keys}) on axis {axis}; "
                f"got {tuple(mask.shape)}"
            )
    if not _readable(mask) or mask.requires_grad:
        return _recognise(mask, batch, queries, keys)
    content = mask[tuple(slice(0, 1) if step == 0 else slice(None) for step in mask.stride())]
    problem = (batch, queries, keys, torch.is_inference_mode_enabled())
    name, known = id(mask), _memo.get(id(mask))
    if known is not None and known[0]() is mask and known[1] == problem and torch.equal(known[2], content):
        return known[3]
    content, found = content.clone(), _recognise(mask, batch, queries, keys)
    _memo[name] = (weakref.ref(mask, functools.partial(_memo.pop, name)), problem, content, found)
    return found


def hides_a_row(mask: Tensor | None) -> bool:
    """Whether some query sees no key, where that is cheap to know: such a row gives 0, of any dtype and size."""
    if mask is None or not _readable(mask):
        return False
    return not bool((mask if mask.dtype == torch.bool else mask != -torch.inf).any(-1).all())


def _readable(mask: Tensor) -> bool:
    """Whether reading the mask costs no device synchronisation."""
    return mask.device.type == "cpu" and not torch.compiler.is_compiling() and type(mask) is Tensor


def _recognise(mask: Tensor, batch: int, queries: int, keys: int) -> Visible:
    one_row = mask.shape[2] == 1 or mask.stride(2) == 0
    one_head = mask.shape[1] == 1 or mask.stride(1) == 0
    readable = _readable(mask)
    if mask.requires_grad or not one_head or not (readable or (mask.dtype == torch.bool and one_row)):
        return _as_bias(mask, readable)
    small = mask[:, 0, :1] if one_row else mask[:, 0]
    if small.shape[0] > 1 and small.stride(0) == 0:
        small = small[:1]
    seen, uniform = (small, None) if mask.dtype == torch.bool else _seen(small)
    if seen is None:
        return _as_bias(mask, readable)
    if uniform is not None:
        uniform = uniform.expand(batch, queries)
    if seen.shape[1] == 1:
        present = seen[:, 0].expand(batch, keys)
        return Visible(keys=None if readable and bool(present.all()) else present, uniform=uniform)
    found = _intervals(seen, batch, queries, keys)
    return _as_bias(mask, readable) if found is None else replace(found, uniform=uniform)


def _seen(additive: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """The boolean form of an additive mask (None where it is more than that), and its rows of finfo.min."""
    if not additive.is_floating_point():
        return None, None
    hidden = additive <= torch.finfo(additive.dtype).min / 2
    if not bool((hidden | (additive == 0)).all()):
        return None, None
    # A row of finite minima sees every key, each with the same score.
    uniform = hidden.all(-1) & (additive != -torch.inf).all(-1)
    if not bool(uniform.any()):
        return ~hidden, None
    return ~hidden | uniform[..., None], uniform


def _intervals(seen: Tensor, batch: int, queries: int, keys: int) -> Visible | None:
    """Each row of ``seen`` (batch|1, Lq, Lk) as an interval of the keys that any row sees, or None."""
    present = seen.any(1)  # (batch|1, Lk)
    before = torch.nn.functional.pad(present.cumsum(-1), (1, 0))
    counts = seen.sum(-1)
    as_bytes = seen.to(torch.uint8)
    empty = counts == 0
    start = as_bytes.argmax(-1).masked_fill(empty, 0)
    end = (keys - as_bytes.flip(-1).argmax(-1)).masked_fill(empty, 0)
    if not torch.equal(before.gather(1, end) - before.gather(1, start), counts):
        return None
    existing = None if bool(present.all()) else present.expand(batch, keys)
    if torch.equal(counts, before[:, -1:].expand_as(counts)):
        return Visible(keys=existing)
    ranges = torch.stack([start, end], dim=-1).to(torch.int32)
    return Visible(existing, ranges.expand(batch, queries, 2))


def _as_bias(mask: Tensor, readable: bool) -> Visible:
    if mask.dtype == torch.bool:
        return Visible(bias=torch.where(mask, 0.0, -torch.inf).to(torch.float32))
    if not mask.is_floating_point():
        raise TypeError(f"attention_mask must be boolean or floating point; got {mask.dtype}")
    floor = max(FLOOR, torch.finfo(mask.dtype).min)
    literal = readable and bool(((mask <= floor) & (mask != -torch.inf)).all(-1).any())
    # -inf must stay -inf, which hides the key.
    return Visible(
        bias=mask if literal else torch.where(mask == -torch.inf, mask, mask.clamp(min=floor)), literal=literal
    )
