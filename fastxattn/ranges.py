"""Builders of ``kv_range``: which keys [start, end) of its own sequence each query sees.

All of them take packed offsets, return (total_q, 2) int32, and wait for no device, provided that ``total_q``, the
number of query rows, is given or can be read off another argument. Rows beyond the last sequence get (0, 0). For a
padded batch use offsets ``torch.arange(batch + 1) * length`` (int32) and ``.unflatten(0, (batch, length))``;
:func:`media_kv_range` takes the padded batch itself. ``cross_attention`` and ``varlen_cross_attention`` build causal
and windowed ranges from ``causal=`` and ``window=``.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fastxattn.ops.checks import check_contents, check_integer_tensor, check_tensor, readable


class _Rows(NamedTuple):
    """For every query row: its sequence, whether it has one, and its place there. All (total_q,) int64 or bool."""

    sequence: Tensor
    valid: Tensor
    place: Tensor


def _locate(cu_seqlens_q: Tensor, total_q: int) -> _Rows:
    rows = torch.arange(total_q, device=cu_seqlens_q.device)
    ends = cu_seqlens_q[1:].contiguous()
    # Offsets beyond which nothing lies count as one more, empty sequence, so that there always is one to point at.
    sequence = torch.searchsorted(ends, rows.to(ends.dtype), right=True)
    return _Rows(sequence, sequence < ends.shape[0], rows - cu_seqlens_q[sequence])


def _lengths(cu_seqlens: Tensor) -> Tensor:
    """(batch + 1,) int64 lengths, with an empty sequence after the last."""
    return torch.nn.functional.pad(cu_seqlens.diff(), (0, 1)).long()


def _pack(start: Tensor, end: Tensor, valid: Tensor) -> Tensor:
    # No key stands beyond 2^31: there the ends of a range are clamped, where a cast would wrap around.
    return torch.where(valid[:, None], torch.stack([start, end], 1).clamp(max=2**31 - 1), 0).to(torch.int32)


def check_count(name: str, count: object, low: int = 0) -> None:
    """That ``count`` is an int of at least ``low``, where -1 means no limit; a count without that is below 2^31."""
    if isinstance(count, bool) or not isinstance(count, int | torch.SymInt):
        raise TypeError(f"{name} must be an int; got {type(count).__name__}")
    if count < low:
        raise ValueError(f"{name} must be at least 0{', or -1 for no limit' if low < 0 else ''}; got {count}")
    if low == 0 and count >= 2**31:
        raise ValueError(f"{name} must be below 2^31; got {count}")


def _check_offsets(name: str, offsets: Tensor) -> None:
    check_integer_tensor(name, offsets, torch.int32)
    if offsets.shape[0] < 1:
        raise ValueError(f"{name} must have shape (batch + 1,), at least one offset; got none")


def _check_both(cu_seqlens_q: Tensor, cu_seqlens_k: Tensor) -> None:
    _check_offsets("cu_seqlens_q", cu_seqlens_q)
    _check_offsets("cu_seqlens_k", cu_seqlens_k)
    for rule, want, got in (
        ("have the shape", tuple(cu_seqlens_q.shape), tuple(cu_seqlens_k.shape)),
        ("be on the device", cu_seqlens_q.device, cu_seqlens_k.device),
    ):
        if want != got:
            raise ValueError(f"cu_seqlens_k must {rule} of cu_seqlens_q, {want}; got {got}")


def _check_media(name: str, per_image: Tensor, media_locations: Tensor, cu_seqlens_q: Tensor) -> None:
    """That ``per_image`` (images,) has one number, not negative, for each marker in a sequence."""
    check_integer_tensor(name, per_image)
    if not (readable(per_image) and readable(media_locations) and readable(cu_seqlens_q)):
        return
    markers = int(media_locations[: int(cu_seqlens_q[-1])].count_nonzero())
    if per_image.shape[0] != markers:
        raise ValueError(
            f"{name} must have one entry per marker in media_locations, {markers}; got {per_image.shape[0]}"
        )
    if markers and int(per_image.min()) < 0:
        raise ValueError(f"{name} must not be negative; got {int(per_image.min())}")


def _total(total_q: int | None, cu_seqlens_q: Tensor) -> int:
    return int(cu_seqlens_q[-1]) if total_q is None else total_q


def causal_kv_range(cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, total_q: int | None = None) -> Tensor:
    """Each query sees the keys up to its own place; the last query is aligned with the last key.

    ::

        3 queries, 5 keys    x x x . .        5 queries, 3 keys    . . .
                             x x x x .                             . . .
                             x x x x x                             x . .
                                                                   x x .
                                                                   x x x

    Args:
        cu_seqlens_q: (batch + 1,) int32.
        cu_seqlens_k: (batch + 1,) int32.
        total_q: rows of query; read from the offsets when None (waits for a GPU).

    Returns:
        (total_q, 2) int32.
    """
    return sliding_window_kv_range(cu_seqlens_q, cu_seqlens_k, -1, 0, total_q)


def sliding_window_kv_range(
    cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, left: int, right: int, total_q: int | None = None
) -> Tensor:
    """Each query sees ``left`` keys before its own place and ``right`` after it, aligned at the end; -1: no limit.

    ::

        left 1, right 0      . x x . .
        3 queries, 5 keys    . . x x .
                             . . . x x

    Args:
        cu_seqlens_q: (batch + 1,) int32.
        cu_seqlens_k: (batch + 1,) int32.
        left: at least 0, or -1.
        right: at least 0, or -1.
        total_q: rows of query; read from the offsets when None (waits for a GPU).

    Returns:
        (total_q, 2) int32.

    Raises:
        ValueError: ``left`` or ``right`` is below -1.
    """
    _check_both(cu_seqlens_q, cu_seqlens_k)
    for name, limit in (("left", left), ("right", right)):
        check_count(name, limit, -1)
    left, right = min(left, 2**31), min(right, 2**31)  # sums with sys.maxsize would wrap around
    rows = _locate(cu_seqlens_q, _total(total_q, cu_seqlens_q))
    keys = _lengths(cu_seqlens_k)[rows.sequence]
    center = rows.place + keys - _lengths(cu_seqlens_q)[rows.sequence]
    start = torch.zeros_like(center) if left < 0 else (center - left).clamp(min=0).minimum(keys)
    end = keys if right < 0 else (center + right + 1).clamp(min=0).minimum(keys)
    return _pack(start.minimum(end), end, rows.valid)


def media_kv_range(
    media_locations: Tensor, cu_seqlens_q: Tensor | None, media_lengths: int | Tensor, *, every: bool = False
) -> Tensor:
    """A text token sees the image that precedes it (Flamingo), or with ``every`` all that precede it; before: none.

    ::

        keys of a sequence    [ image 0 ][ image 1 ]
        the                    . . . . .  . . . . .
        <image> a cat          x x x x x  . . . . .       a marker token itself sees its image
        <image> a dog          . . . . .  x x x x x       with every=True: x x x x x  x x x x x

    Args:
        media_locations: (total_q,) boolean, True at the token that stands for an image; without ``cu_seqlens_q``
            (batch, length), a padded batch.
        cu_seqlens_q: (batch + 1,) int32, or None.
        media_lengths: key tokens of an image: one int for all (64 after a Perceiver resampler), or (images,) integer,
            in the order of the markers over the whole batch. A sequence's keys are its images' tokens in that order.
        every: see all preceding images instead of the last.

    Returns:
        (total_q, 2) int32; (batch, length, 2) for a padded batch.

    Alayrac et al., Flamingo: a visual language model for few-shot learning (2022), section 2.3.
    """
    if cu_seqlens_q is None:
        if media_locations.dtype != torch.bool or media_locations.ndim != 2:
            got = f"{media_locations.dtype} {tuple(media_locations.shape)}"
            raise TypeError(f"media_locations must be boolean of shape (batch, length); got {got}")
        batch, length = media_locations.shape
        offsets = torch.arange(batch + 1, dtype=torch.int32, device=media_locations.device) * length
        packed = media_kv_range(media_locations.flatten(), offsets, media_lengths, every=every)
        return packed.unflatten(0, (batch, length))
    first, image, image_here = _preceding_media(media_locations, cu_seqlens_q)
    if not isinstance(media_lengths, Tensor):
        check_count("media_lengths", media_lengths)
        start, end = (image - first) * media_lengths, (image - first + 1) * media_lengths
    else:
        _check_media("media_lengths", media_lengths, media_locations, cu_seqlens_q)
        before = torch.nn.functional.pad(media_lengths.long().cumsum(0), (1, 0))
        last = before.shape[0] - 1
        origin = before[first.clamp(max=last)]
        start, end = before[image.clamp(0, last)] - origin, before[(image + 1).clamp(max=last)] - origin
    return _pack(torch.zeros_like(start) if every else start, end, image_here)


def tile_kv_range(
    media_locations: Tensor, cu_seqlens_q: Tensor, tiles: Tensor, tokens_per_tile: int, max_tiles: int
) -> Tensor:
    """A text token sees the valid tiles of the image that precedes it, where every image is padded to ``max_tiles``.

    ::

        keys of a sequence    [ tile 0 ][ tile 1 ][ padding ][ padding ]   image 0: 2 of 4 tiles
        the                    . . . .   . . . .   . . . . .  . . . . .
        <image> a cat          x x x x   x x x x   . . . . .  . . . . .

    Args:
        media_locations: (total_q,) boolean, True at the token that stands for an image.
        cu_seqlens_q: (batch + 1,) int32.
        tiles: (images,) integer, valid tiles of each image in the order of the markers over the whole batch.
        tokens_per_tile: key tokens of a tile.
        max_tiles: tiles that each image takes in the keys, valid or not.

    Returns:
        (total_q, 2) int32.

    Grattafiori et al., The Llama 3 herd of models (2024), section 7.
    """
    for name, count in (("tokens_per_tile", tokens_per_tile), ("max_tiles", max_tiles)):
        check_count(name, count)
    first, image, image_here = _preceding_media(media_locations, cu_seqlens_q)
    _check_media("tiles", tiles, media_locations, cu_seqlens_q)
    start = (image - first) * max_tiles * tokens_per_tile
    if tiles.shape[0] == 0:
        return _pack(start, start, torch.zeros_like(image_here))
    valid = tiles.long()[image.clamp(0, tiles.shape[0] - 1)].clamp(0, max_tiles)
    return _pack(start, start + valid * tokens_per_tile, image_here)


def _preceding_media(media_locations: Tensor, cu_seqlens_q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """By query row: the first image of its sequence, the last image up to it (both by number), and if there is one."""
    _check_offsets("cu_seqlens_q", cu_seqlens_q)
    if media_locations.dtype != torch.bool:
        raise TypeError(f"media_locations must be boolean; got {media_locations.dtype}")
    if media_locations.ndim != 1:
        raise ValueError(f"media_locations must have shape (total_q,); got {tuple(media_locations.shape)}")
    rows = _locate(cu_seqlens_q, media_locations.shape[0])
    before = torch.nn.functional.pad(media_locations.cumsum(0), (1, 0))  # markers before each row
    first = before[cu_seqlens_q.long()[rows.sequence]]
    image = before[1:] - 1
    return first, image, rows.valid & (image >= first)


def timestamp_kv_range(
    query_times: Tensor,
    key_times: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    before: float,
    after: float | None = None,
) -> Tensor:
    """A query at time t sees the keys with t - before <= time <= t + after.

    ::

        before 1, after 0    key times    0.0 0.5 1.0 1.5 2.0 2.5
                             t = 1.0       x   x   x   .   .   .
                             t = 2.2       .   .   .   x   x   .

    Integer times are compared as integers, exactly (nanoseconds since 1970 included); floating-point times, and an
    integer tensor beside a floating-point one, in float64.

    Args:
        query_times: (total_q,) floating or integer, in any order.
        key_times: (total_k,) floating or integer, ascending within each sequence.
        cu_seqlens_q: (batch + 1,) int32.
        cu_seqlens_k: (batch + 1,) int32.
        before: how far a query looks back; infinity for no limit.
        after: how far it looks ahead; ``before`` when None.

    Returns:
        (total_q, 2) int32.

    Raises:
        TypeError: times or limits are no numbers.
        ValueError: a shape or device is wrong, or a limit is NaN; where contents can be read without waiting for a
            device, also NaN times, key times that decrease within a sequence, and integers beyond 2**53 beside floats.
    """
    after = before if after is None else after
    for name, limit in (("before", before), ("after", after)):
        check_limit(name, limit)
    _check_both(cu_seqlens_q, cu_seqlens_k)
    integer = [_check_times(name, t) for name, t in (("query_times", query_times), ("key_times", key_times))]
    for name, t in (("key_times", key_times), ("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        if t.device != query_times.device:
            raise ValueError(f"{name} must be on the device of query_times, {query_times.device}; got {t.device}")
    if readable(key_times):
        check_contents("cu_seqlens_k", cu_seqlens_k, key_times.shape[0], "key_times")
        _check_ascending(key_times, cu_seqlens_k)
        if integer[0] != integer[1]:
            for name, t in (("query_times", query_times), ("key_times", key_times)):
                if t.is_floating_point() or not t.numel():
                    continue
                extremes = [int(value) for value in torch.aminmax(t.long())]
                if max(map(abs, extremes)) > 2**53:
                    raise ValueError(f"{name} must lie within 2**53 beside floating-point times; got {extremes}")
    dtype = torch.int64 if all(integer) else torch.float64
    times, keys = query_times.to(dtype), key_times.to(dtype)
    rows = _locate(cu_seqlens_q, times.shape[0])
    low = cu_seqlens_k.long()[rows.sequence]
    high = low + _lengths(cu_seqlens_k)[rows.sequence]
    start = _bisect(keys, _moved(times, -before, math.ceil), low, high, right=False)
    end = _bisect(keys, _moved(times, after, math.floor), low, high, right=True)
    return _pack(start - low, torch.maximum(start, end) - low, rows.valid)


def check_limit(name: str, limit: object) -> None:
    """That a window's limit is a number and not NaN."""
    if isinstance(limit, bool) or not isinstance(limit, numbers.Real | torch.SymInt | torch.SymFloat):
        raise TypeError(f"{name} must be a number; got {type(limit).__name__}")
    if limit != limit:
        raise ValueError(f"{name} must not be NaN; got {limit}")


def _check_times(name: str, times: object) -> bool:
    """Whether ``times`` (rows,) are integers; refuses what is no tensor of times."""
    times = check_tensor(name, times)
    if times.dtype in (torch.bool, torch.uint64) or times.is_complex():
        raise TypeError(f"{name} must be floating-point or integers up to int64; got {times.dtype}")
    if times.ndim != 1:
        raise ValueError(f"{name} must have one axis; got shape {tuple(times.shape)}")
    if times.is_floating_point() and readable(times) and bool(times.isnan().any()):
        raise ValueError(f"{name} must not be NaN; got NaN at row {int(times.isnan().to(torch.uint8).argmax())}")
    return not times.is_floating_point()


def _check_ascending(key_times: Tensor, cu_seqlens_k: Tensor) -> None:
    falls = torch.nn.functional.pad(key_times[1:] < key_times[:-1], (1, 1))  # falls[i]: row i is before row i - 1
    falls[cu_seqlens_k.long()] = False  # a sequence may begin before the last one ends
    falls[int(cu_seqlens_k[-1]) :] = False
    if bool(falls.any()):
        at = int(falls.to(torch.uint8).argmax())
        pair = key_times[at - 1 : at + 1].tolist()
        raise ValueError(f"key_times must ascend within each sequence; got {pair[0]} then {pair[1]} at row {at}")


def _moved(times: Tensor, shift: float, rounding: Callable[[float], int]) -> Tensor:
    """``times + shift``; for int64 times by a whole number, ending at the limits of int64 instead of wrapping round."""
    unlimited = abs(shift) == math.inf
    if times.is_floating_point():
        return torch.full_like(times, shift) if unlimited else times + shift
    limits = torch.iinfo(torch.int64)
    if unlimited:
        return torch.full_like(times, limits.max if shift > 0 else limits.min)
    whole = min(max(rounding(shift), limits.min), limits.max)
    moved = times + whole
    return (
        torch.where(moved < times, limits.max, moved) if whole >= 0 else torch.where(moved > times, limits.min, moved)
    )


def _bisect(times: Tensor, target: Tensor, low: Tensor, high: Tensor, *, right: bool) -> Tensor:
    """The first place in times[low:high] not before ``target`` (``right``: after it), element by element."""
    if times.shape[0] == 0:
        return low
    steps = 32 if torch.compiler.is_compiling() else times.shape[0].bit_length()
    for _ in range(steps):
        middle = (low + high) // 2
        here = times[middle.clamp(max=times.shape[0] - 1)]
        ahead = ((here <= target) if right else (here < target)) & (low < high)
        low, high = torch.where(ahead, middle + 1, low), torch.where(ahead, high, middle)
    return low
