"""The mask function registered beside the attention function.

Without one, transformers passes *no mask at all* to an attention implementation it does not know. It must return four
axes (a 2-D mask breaks SigLIP2 and Pix2Struct); for padding that is a stride-0 expansion over the queries, which costs
nothing and from which :func:`fastxattn.integrations.masks.recognise` reads the lengths. Long causal and windowed masks
are :class:`IntervalMask`, which never makes the (Lq, Lk) matrix.

A causal mask is always made, never left to ``is_causal``: that attribute is True on modules that are not causal.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from transformers import masking_utils

from fastxattn.integrations.catalogue import EAGER
from fastxattn.integrations.masks import Visible, recognise

LONG = 2**20
"""Elements (Lq * Lk) from which a mask is kept as intervals; below, a dense one costs less than 1 MiB."""


class IntervalMask(Tensor):
    """A boolean mask (batch, 1, Lq, Lk), True = sees, kept as valid keys and one interval of keys per query.

    Every operation but attention's makes the dense mask, once; from then on that one is what the object stands for.
    """

    _visible: Visible
    _dense: list[Tensor]
    _causal: bool

    @staticmethod
    def __new__(
        cls, visible: Visible, shape: tuple[int, ...], causal: bool, dense: list[Tensor] | None = None
    ) -> IntervalMask:
        assert visible.ranges is not None
        self: IntervalMask = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, shape, dtype=torch.bool, device=visible.ranges.device
        )
        self._visible, self._causal, self._dense = visible, causal, [] if dense is None else dense
        return self

    @property
    def causal(self) -> bool:
        """Whether each token sees itself and all before it."""
        return self._causal and not self._dense

    @property
    def visible(self) -> Visible:
        """What each query sees."""
        batch, _, queries, keys = self.shape
        return recognise(self._dense[0], batch, queries, keys) if self._dense else self._visible

    def dense(self) -> Tensor:
        """The mask as an ordinary tensor."""
        if not self._dense:
            ranges, place = self._visible.ranges, torch.arange(self.shape[3], device=self.device)
            assert ranges is not None
            seen = (ranges[..., :1] <= place) & (place < ranges[..., 1:])
            if self._visible.keys is not None:
                seen &= self._visible.keys[:, None]
            self._dense.append(seen[:, None])
        return self._dense[0]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        if func in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            return cls(args[0]._visible, tuple(args[0].shape), args[0]._causal, args[0]._dense)
        args, kwargs = pytree.tree_map_only(IntervalMask, IntervalMask.dense, (args, kwargs or {}))
        return func(*args, **kwargs)


def fastxattn_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = masking_utils.causal_mask_function,
    attention_mask: Tensor | None = None,
    allow_is_bidirectional_skip: bool = False,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> Tensor | None:
    """(batch, 1, Lq, Lk) boolean, True = sees; None: everything is visible. Arguments as transformers passes them."""
    sizes = {"batch_size": batch_size, "q_length": q_length, "kv_length": kv_length}
    options: dict[str, Any] = {
        **kwargs,
        **{"q_offset": q_offset, "kv_offset": kv_offset, "mask_function": mask_function},
        **{"attention_mask": attention_mask, "allow_is_causal_skip": False, "device": device},
    }
    if getattr(kwargs.get("config"), "model_type", "").startswith(tuple(EAGER)):
        return masking_utils.eager_mask(**sizes, **options, allow_is_bidirectional_skip=allow_is_bidirectional_skip)  # type: ignore
    if mask_function is not masking_utils.bidirectional_mask_function:
        if _never_applied(sizes, options, kwargs):
            return None
        if q_length * kv_length >= LONG and not torch.compiler.is_compiling():
            causal = _causal(sizes, options)
            found = _intervals(sizes, options) if causal is None else causal
            if found is not None:
                square = q_length == kv_length and q_offset == kv_offset
                return IntervalMask(found, (batch_size, 1, q_length, kv_length), causal is not None and square)
        return masking_utils.sdpa_mask(**sizes, **options, allow_is_bidirectional_skip=False)  # type: ignore
    present = masking_utils.prepare_padding_mask(attention_mask, kv_length, kv_offset)
    if present is None:
        if allow_is_bidirectional_skip:
            return None
        present = torch.ones(1, kv_length, dtype=torch.bool, device=device)
    present = present[:, kv_offset : kv_offset + kv_length].to(torch.bool)
    return present[:, None, None, :].expand(batch_size, 1, q_length, kv_length)  # type: ignore


def _never_applied(sizes: dict[str, int], options: dict[str, Any], given: dict[str, Any]) -> bool:
    """Whether sdpa leaves a causal mask to ``is_causal``, which is False in bidirectional layers (ColPali's Gemma)."""
    if not getattr(given.get("config"), "use_bidirectional_attention", False):
        return False
    queries, keys, first = sizes["q_length"], sizes["kv_length"], options["kv_offset"]
    present = masking_utils.prepare_padding_mask(options["attention_mask"], keys, first)
    return given.get("allow_is_causal_skip", True) and masking_utils._ignore_causal_mask_sdpa(
        present, queries, keys, options["q_offset"], first, given.get("local_size")
    )


def _causal(sizes: dict[str, int], options: dict[str, Any]) -> Visible | None:
    """A causal mask over all tokens, which no tensor has to be read for."""
    offsets = (options["q_offset"], options["kv_offset"])
    if options["mask_function"] is not masking_utils.causal_mask_function or options["attention_mask"] is not None:
        return None
    if not all(isinstance(offset, int) for offset in offsets):
        return None
    ends = torch.arange(sizes["q_length"], dtype=torch.int32, device=options["device"]) + (offsets[0] - offsets[1] + 1)
    ends = ends.clamp(0, sizes["kv_length"])
    return Visible(ranges=torch.stack([torch.zeros_like(ends), ends], -1).expand(sizes["batch_size"], -1, 2))


def _intervals(sizes: dict[str, int], options: dict[str, Any]) -> Visible | None:
    """The mask as intervals, from as many of its rows at a time as :data:`LONG` elements hold; None: it has others."""
    if torch.device(options["device"]).type != "cpu" or isinstance(options["q_offset"], Tensor):
        return None
    batch, queries, keys = sizes["batch_size"], sizes["q_length"], sizes["kv_length"]
    first = options["kv_offset"]
    present = masking_utils.prepare_padding_mask(options["attention_mask"], keys, first)
    if present is not None:
        present = present[:, first : first + keys].to(torch.bool)
        present = None if bool(present.all()) else present.expand(batch, keys)
    before = torch.arange(keys + 1)[None]
    if present is not None:
        before = torch.nn.functional.pad(present.cumsum(-1), (1, 0))
    ranges, step = [], max(LONG // (batch * keys), 1)
    for start in range(0, queries, step):
        block = {**options, "q_offset": options["q_offset"] + start}
        rows = masking_utils.sdpa_mask(batch, min(step, queries - start), keys, **block)[:, 0]
        rows = rows[:1] if rows.stride(0) == 0 else rows
        counts, as_bytes = rows.sum(-1), rows.to(torch.uint8)
        empty = counts == 0
        begin = as_bytes.argmax(-1).masked_fill(empty, 0)
        end = (keys - as_bytes.flip(-1).argmax(-1)).masked_fill(empty, 0)
        places = before.expand(rows.shape[0], -1)
        if not torch.equal(places.gather(1, end) - places.gather(1, begin), counts):
            return None
        ranges.append(torch.stack([begin, end], -1).to(torch.int32).expand(batch, -1, 2))
    return Visible(present, torch.cat(ranges, 1))
