"""A padded batch as the packed problem it is: rows where they lie, masks as the rows to visit.

Row ``b * length + i`` of the flattened tensors is token i of sequence b, and sequence b's slots start at
``b * length``. A mask that is a prefix is just a number of slots in use; any other mask is an index that lists the
rows of the valid tokens (and after them, out of use, the padding).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastxattn.ops.checks import check_int32, check_mask, check_tensor


class Layout(NamedTuple):
    """The packed problem of a padded call."""

    tokens: dict[str, Any]
    """The fields of :class:`Problem` that say what the tokens are."""
    key_mask: Tensor | None
    batch: int
    heads: int
    length_q: int
    length_k: int

    @classmethod
    def of(
        cls, query: Tensor, key: Tensor, value: Tensor, query_mask: Tensor | None, key_mask: Tensor | None
    ) -> Layout:
        """Check the padded shapes and flatten them."""
        for name, t in (("query", query), ("key", key), ("value", value)):
            check_tensor(name, t)
            if t.ndim != 4:
                raise ValueError(f"{name} must have shape (batch, length, heads, dim); got {tuple(t.shape)}")
        batch, length_q, length_k = query.shape[0], query.shape[1], key.shape[1]
        for name, t in (("key", key), ("value", value)):
            if t.shape[0] != batch:
                raise ValueError(f"{name} must have the batch of query, {batch}; got {t.shape[0]}")
        if value.shape[1] != length_k:
            raise ValueError(f"value must have the length of key, {length_k}; got {value.shape[1]}")
        used_q, index_q = _rows_in_use("query_mask", query_mask, query)
        used_k, index_k = _rows_in_use("key_mask", key_mask, key)
        tokens = {
            "query": query.flatten(0, 1),
            "key": key.flatten(0, 1),
            "value": value.flatten(0, 1),
            "cu_seqlens_q": _starts(batch, length_q, query.device),
            "cu_seqlens_k": _starts(batch, length_k, key.device),
            "seqused_q": used_q,
            "seqused_k": used_k,
            "query_index": index_q,
            "key_index": index_k,
        }
        return cls(tokens, key_mask, batch, query.shape[2], length_q, length_k)

    def ranges(self, kv_range: Tensor | None) -> Tensor | None:
        """Ranges of padded key positions as ranges of key slots, one per query row."""
        if kv_range is None:
            return None
        check_int32("kv_range", check_tensor("kv_range", kv_range))
        full, shape = (self.batch, self.length_q, 2), tuple(kv_range.shape)
        if len(shape) not in (2, 3) or shape[-1] != 2 or not _broadcasts(shape, full):
            raise ValueError(f"kv_range must broadcast to (batch, Lq, 2), {full}; got {shape}")
        kv_range = kv_range.expand(full)
        if self.key_mask is not None:
            # How many keys are there before each padded position.
            before = torch.nn.functional.pad(self.key_mask.cumsum(1, dtype=torch.int32), (1, 0))
            inside = kv_range.clamp(0, self.length_k)
            # What leaves the padded axis still leaves the sequence afterwards, to be refused with it.
            kv_range = before.gather(1, inside.flatten(1).long()).view_as(kv_range) + (kv_range - inside)
        return kv_range.reshape(-1, 2)

    def per_key(self, key_bias: Tensor | None) -> Tensor | None:
        """(batch, Lk) or (batch, Lk, heads) flattened to key rows."""
        if key_bias is None:
            return None
        check_tensor("key_bias", key_bias)
        if key_bias.ndim not in (2, 3) or key_bias.shape[0] != self.batch or key_bias.shape[1] != self.length_k:
            raise ValueError(
                f"key_bias must have shape (batch, Lk) or (batch, Lk, heads), ({self.batch}, {self.length_k}[, heads]);"
                f" got {tuple(key_bias.shape)}"
            )
        return key_bias.flatten(0, 1)

    def four_axes(self, bias: Tensor | None) -> Tensor | None:
        """The bias with leading axes of 1 up to (batch, heads, Lq, Lk); each axis 1 or full."""
        if bias is None:
            return None
        check_tensor("bias", bias)
        if not bias.is_floating_point():
            raise TypeError(f"bias must be a floating tensor (masks go in key_mask and kv_range); got {bias.dtype}")
        full = (self.batch, self.heads, self.length_q, self.length_k)
        if bias.ndim > 4 or not _broadcasts(tuple(bias.shape), full):
            raise ValueError(f"bias must broadcast to (batch, heads, Lq, Lk), {full}; got {tuple(bias.shape)}")
        return bias.reshape((1,) * (4 - bias.ndim) + tuple(bias.shape))


def _broadcasts(shape: tuple[int, ...], full: tuple[int, ...]) -> bool:
    return all(n in (1, size) for n, size in zip(shape[::-1], full[::-1], strict=False))


def _starts(batch: int, length: int, device: torch.device) -> Tensor:
    """(batch + 1,) int32: b * length."""
    if length and not torch.compiler.is_compiling():  # one kernel instead of two; a trace keeps its shape simple
        return torch.arange(0, (batch + 1) * length, length, dtype=torch.int32, device=device)
    return torch.arange(batch + 1, dtype=torch.int32, device=device) * length


def _rows_in_use(name: str, mask: Tensor | None, tokens: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Slots in use per sequence, and the index when they are not simply the first rows."""
    if mask is None:
        return None, None
    check_mask(name, mask, tokens)
    used = mask.sum(1, dtype=torch.int32)
    if _may_look(mask) and bool((mask[:, 1:] <= mask[:, :-1]).all()):
        return used, None
    # A stable partition of each row of the mask: valid tokens first. No size depends on the contents.
    length = mask.shape[1]
    rank = torch.where(mask, mask.cumsum(1), used[:, None] + mask.logical_not().cumsum(1)) - 1
    places = torch.arange(length, device=mask.device).expand_as(rank)
    index = torch.empty_like(rank).scatter_(1, rank, places)
    index = index + torch.arange(mask.shape[0], device=mask.device)[:, None] * length
    return used, index.flatten().to(torch.int32)


def _may_look(mask: Tensor) -> bool:
    """Whether reading the mask costs no wait and breaks no trace."""
    return mask.is_cpu and type(mask) is Tensor and not torch.compiler.is_compiling()
