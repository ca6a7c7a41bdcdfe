"""kv_range builders against dense boolean masks written the slow way."""

import functools
import math
import re
import sys
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fastxattn
from fastxattn import ranges
from fastxattn.testing import offsets

LENGTHS = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=0, max_size=5)


def dense(kv_range, cu_q, lengths_k):
    """One (queries, keys) boolean list of lists per sequence."""
    masks = []
    for b, keys in enumerate(lengths_k):
        rows = kv_range[int(cu_q[b]) : int(cu_q[b + 1])].tolist()
        masks.append([[start <= j < end for j in range(keys)] for start, end in rows])
    return masks


def check(kv_range, cu_q, lengths_q, lengths_k, sees):
    assert kv_range.dtype == torch.int32
    pairs = list(zip(lengths_q, lengths_k, strict=True))
    wanted = [[[sees(b, i, j) for j in range(m)] for i in range(n)] for b, (n, m) in enumerate(pairs)]
    assert dense(kv_range, cu_q, lengths_k) == wanted
    for (start, end), keys in zip(kv_range.tolist(), [m for n, m in pairs for _ in range(n)], strict=True):
        assert 0 <= start <= end <= keys


@given(LENGTHS, st.integers(-1, 4), st.integers(-1, 4))
@settings(max_examples=60, deadline=None)
def test_windows(lengths, left, right):
    n, m = [a for a, _ in lengths], [b for _, b in lengths]
    cu_q, cu_k = offsets(n), offsets(m)
    made = ranges.sliding_window_kv_range(cu_q, cu_k, left, right, total_q=sum(n) + 3)
    assert made.shape == (sum(n) + 3, 2)
    assert not made[sum(n) :].any()

    def sees(b, i, j):
        center = i + m[b] - n[b]
        return (left < 0 or j >= center - left) and (right < 0 or j <= center + right)

    check(made[: sum(n)], cu_q, n, m, sees)
    check(ranges.causal_kv_range(cu_q, cu_k), cu_q, n, m, lambda b, i, j: j <= i + m[b] - n[b])


@given(st.lists(st.lists(st.booleans(), max_size=8), max_size=4), st.data())
@settings(max_examples=60, deadline=None)
def test_media(markers, data):
    cu_q = offsets([len(row) for row in markers])
    media = [[data.draw(st.integers(0, 3)) for on in row if on] for row in markers]  # tokens of each image
    locations = torch.tensor([on for row in markers for on in row], dtype=torch.bool)
    sizes = torch.tensor([n for row in media for n in row], dtype=torch.int64)
    owner = [[image for image, n in enumerate(row) for _ in range(n)] for row in media]  # image of each key

    def last(b, i):
        return sum(markers[b][: i + 1]) - 1

    args = (cu_q, [len(r) for r in markers], [len(o) for o in owner])
    made = ranges.media_kv_range(locations, cu_q, sizes)
    assert dense(made, cu_q, args[2]) == [
        [[owner[b][j] == last(b, i) for j in range(args[2][b])] for i in range(len(row))]
        for b, row in enumerate(markers)
    ]
    check(ranges.media_kv_range(locations, cu_q, sizes, every=True), *args, lambda b, i, j: owner[b][j] <= last(b, i))
    fixed = [len(row) * 3 for row in media]
    made = ranges.media_kv_range(locations, cu_q, 3)
    check(made, args[0], args[1], fixed, lambda b, i, j: j // 3 == last(b, i))


@given(st.lists(st.lists(st.booleans(), max_size=8), max_size=4), st.data())
@settings(max_examples=40, deadline=None)
def test_tiles(markers, data):
    cu_q = offsets([len(row) for row in markers])
    tiles = [[data.draw(st.integers(0, 4)) for on in row if on] for row in markers]
    locations = torch.tensor([on for row in markers for on in row], dtype=torch.bool)
    made = ranges.tile_kv_range(locations, cu_q, torch.tensor([n for r in tiles for n in r], dtype=torch.int32), 2, 4)

    def sees(b, i, j):
        image, tile = j // 8, j % 8 // 2
        return image == sum(markers[b][: i + 1]) - 1 and tile < tiles[b][image]

    lengths_k = [len(row) * 8 for row in tiles]
    assert dense(made, cu_q, lengths_k) == [
        [[sees(b, i, j) for j in range(lengths_k[b])] for i in range(len(row))] for b, row in enumerate(markers)
    ]


@given(
    st.lists(st.tuples(*[st.lists(st.integers(0, 12), max_size=9)] * 2), max_size=4),
    st.integers(0, 4),
    st.integers(0, 4),
)
@settings(max_examples=60, deadline=None)
def test_timestamps(times, before, after):
    q, k = [a for a, _ in times], [sorted(b) for _, b in times]
    cu_q, cu_k = offsets([len(t) for t in q]), offsets([len(t) for t in k])
    flat_q, flat_k = (torch.tensor([t for row in side for t in row], dtype=torch.float32) for side in (q, k))
    made = ranges.timestamp_kv_range(flat_q, flat_k, cu_q, cu_k, before, after)
    check(
        made,
        cu_q,
        [len(t) for t in q],
        [len(t) for t in k],
        lambda b, i, j: q[b][i] - before <= k[b][j] <= q[b][i] + after,
    )


def test_symmetric_tolerance_by_default():
    cu_q, cu_k = offsets([1]), offsets([5])
    made = ranges.timestamp_kv_range(torch.tensor([2.0]), torch.arange(5.0), cu_q, cu_k, 1.0)
    assert made.tolist() == [[1, 4]]


def test_bad_arguments():
    cu = offsets([2])
    with pytest.raises(ValueError, match="left must be at least 0, or -1 for no limit; got -2"):
        ranges.sliding_window_kv_range(cu, cu, -2, 0)
    with pytest.raises(TypeError, match=r"cu_seqlens_q must be torch.int32; got torch.int64"):
        ranges.causal_kv_range(cu.long(), cu)
    with pytest.raises(TypeError, match="media_locations must be boolean"):
        ranges.media_kv_range(torch.zeros(2), cu, 3)
    for change, error, words in (
        (
            {"query_times": torch.zeros(2, dtype=torch.bool)},
            TypeError,
            "query_times must be floating-point or integers",
        ),
        (
            {"query_times": torch.tensor([0.0, float("nan")])},
            ValueError,
            "query_times must not be NaN; got NaN at row 1",
        ),
        ({"key_times": torch.tensor([1.0, 0.5])}, ValueError, r"key_times must ascend .*; got 1.0 then 0.5 at row 1"),
        ({"key_times": torch.zeros(2, 1)}, ValueError, "key_times must have one axis"),
        ({"key_times": torch.zeros(1)}, ValueError, "cu_seqlens_k must end within the 1 key_times; got 2"),
        ({"key_times": torch.zeros(2, device="meta")}, ValueError, "key_times must be on the device of query_times"),
        ({"key_times": torch.tensor([0, 2**53 + 1])}, ValueError, r"key_times must lie within 2\*\*53 beside floating"),
        ({"cu_seqlens_k": offsets([1, 1])}, ValueError, "cu_seqlens_k must have the shape of cu_seqlens_q"),
        ({"before": float("nan")}, ValueError, "before must not be NaN"),
        ({"after": True}, TypeError, "after must be a number; got bool"),
    ):
        good = {"query_times": torch.zeros(2), "key_times": torch.zeros(2), "cu_seqlens_q": cu, "cu_seqlens_k": cu}
        with pytest.raises(error, match=words):
            ranges.timestamp_kv_range(**{**good, "before": 1.0, **change})
    with pytest.raises(TypeError, match="left must be an int; got float"):
        ranges.sliding_window_kv_range(cu, cu, float("nan"), 0)
    locations = torch.tensor([True, False])
    for lengths, words in (
        (torch.tensor([2, 2]), "media_lengths must have one entry per marker in media_locations, 1; got 2"),
        (torch.tensor([-2]), "media_lengths must not be negative; got -2"),
        (-3, "media_lengths must be at least 0; got -3"),
    ):
        with pytest.raises(ValueError, match=words):
            ranges.media_kv_range(locations, cu, lengths)
    with pytest.raises(ValueError, match="tiles must have one entry per marker in media_locations, 1; got 0"):
        ranges.tile_kv_range(locations, cu, torch.zeros(0, dtype=torch.int32), 2, 4)


BASES = (0, 2**24, 2**53, 1_764_432_000_000_000_000, -(2**63) + 5, 2**63 - 40)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize(
    ("before", "after"), [(1, 0), (0.5, 2.5), (0, 1), (-1, 3), (-0.5, 2.5), (math.inf, 0), (100, 100)]
)
def test_integer_timestamps_are_exact(base, before, after):
    q, k = [base + i for i in (0, 3, 4, 9, 30)], [base + i for i in (0, 1, 1, 3, 5, 10, 29, 31)]
    cu_q, cu_k = offsets([5]), offsets([8])
    made = ranges.timestamp_kv_range(torch.tensor(q), torch.tensor(k), cu_q, cu_k, before, after)

    def sees(b, i, j):
        return (math.isinf(before) or q[i] - Fraction(before) <= k[j]) and k[j] <= q[i] + Fraction(after)

    check(made, cu_q, [5], [8], sees)


@pytest.mark.parametrize(
    "dtypes", [(torch.int32, torch.int64), (torch.float32, torch.int64), (torch.float64, torch.float32)]
)
def test_timestamps_of_two_dtypes(dtypes):
    """A float32 sum would round these to even numbers."""
    q, k = [2**24 + 2, 2**24 + 4], [2**24 - 1, 2**24 + 1, 2**24 + 2, 2**24 + 6]
    of_q, of_k = torch.tensor(q, dtype=dtypes[0]), torch.tensor(k, dtype=torch.float64).to(dtypes[1])
    cu_q, cu_k = offsets([2]), offsets([4])
    made = ranges.timestamp_kv_range(of_q, of_k, cu_q, cu_k, 1, 1)
    exact = of_k.tolist()
    check(made, cu_q, [2], [4], lambda b, i, j: abs(q[i] - exact[j]) <= 1)


def test_later_key_times_may_begin_anew_in_the_next_sequence():
    made = ranges.timestamp_kv_range(
        torch.tensor([5.0, 1.0]), torch.tensor([4.0, 5.0, 1.0, 9.0, 0.0]), offsets([1, 1]), offsets([2, 2]), 1.0
    )
    assert made.tolist() == [[0, 2], [0, 1]]


def test_counts_that_int32_cannot_hold_never_wrap_around():
    one = torch.tensor([0, 4], dtype=torch.int32)
    wide = ranges.sliding_window_kv_range(one, one, sys.maxsize, sys.maxsize)
    assert wide.tolist() == [[0, 4]] * 4
    media = torch.tensor([False, True, False, True])
    top = 2**31 - 1
    far = [[0, 0], [0, top], [0, top], [top, top]]
    assert ranges.media_kv_range(media, one, top).tolist() == far
    assert ranges.media_kv_range(media, one, torch.tensor([2**31, 5])).tolist() == far
    assert ranges.tile_kv_range(media, one, torch.tensor([1, 1]), 2**16, 2**16).tolist()[-1] == [top, top]
    assert ranges.media_kv_range(media[None], None, top)[0].tolist() == far
    with pytest.raises(ValueError, match=r"media_lengths must be below 2\^31; got 2147483648"):
        ranges.media_kv_range(media, one, 2**31)


def test_in_attention():
    """A causal range gives what SDPA's causal mask gives when lengths are equal."""
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 12, 2, 8)
    cu = offsets([5, 0, 7])
    out = fastxattn.varlen_cross_attention(q, k, v, cu, cu, kv_range=ranges.causal_kv_range(cu, cu))
    for part in (slice(0, 5), slice(5, 12)):
        args = (t[part].transpose(0, 1) for t in (q, k, v))
        wanted = torch.nn.functional.scaled_dot_product_attention(*args, is_causal=True).transpose(0, 1)
        torch.testing.assert_close(out[part], wanted)


@pytest.mark.parametrize(
    ("options", "limits"),
    [
        ({"causal": True}, (-1, 0)),
        ({"window": 2}, (2, 2)),
        ({"window": (1, -1)}, (1, -1)),
        ({"causal": True, "window": 2}, (2, 0)),
        ({"causal": True, "window": (-1, 3)}, (-1, 0)),
    ],
    ids=str,
)
def test_causal_and_window_build_a_range(options, limits):
    """In both layouts, aligned at the last query and the last key."""
    torch.manual_seed(0)
    q, k = torch.randn(7, 2, 8), torch.randn(11, 2, 8)
    cu_q, cu_k = offsets([5, 0, 2]), offsets([3, 2, 6])
    out = fastxattn.varlen_cross_attention(q, k, k, cu_q, cu_k, **options)
    made = ranges.sliding_window_kv_range(cu_q, cu_k, *limits)
    assert torch.equal(out, fastxattn.varlen_cross_attention(q, k, k, cu_q, cu_k, kv_range=made))
    q, k, mask = torch.randn(2, 4, 2, 8), torch.randn(2, 6, 2, 8), torch.rand(2, 6) > 0.3
    made = ranges.sliding_window_kv_range(offsets([4]), offsets([6]), *limits)
    out = fastxattn.cross_attention(q, k, k, key_mask=mask, **options)
    assert torch.equal(out, fastxattn.cross_attention(q, k, k, key_mask=mask, kv_range=made))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"causal": True, "kv_range": torch.zeros(2, 2).int()}, ValueError, "kv_range must be None beside causal"),
        ({"window": 1, "kv_range": torch.zeros(2, 2).int()}, ValueError, "kv_range must be None beside window"),
        ({"window": (1, 2, 3)}, TypeError, "window must be an int or (left, right); got (1, 2, 3)"),
        ({"window": True}, TypeError, "window must be an int or (left, right); got True"),
        ({"window": (1.5, 0)}, TypeError, "left of window must be an int; got float"),
        ({"window": (0, -2)}, ValueError, "right of window must be at least 0, or -1 for no limit; got -2"),
        ({"causal": torch.ones(2, 2).bool()}, TypeError, "causal must be a bool; got Tensor"),
        ({"causal": "no"}, TypeError, "causal must be a bool; got str"),
        ({"causal": None}, TypeError, "causal must be a bool; got NoneType"),
    ],
    ids=str,
)
def test_causal_and_window_are_refused(options, error, message):
    q, cu = torch.randn(2, 1, 4), offsets([2])
    with pytest.raises(error, match=re.escape(message)):
        fastxattn.varlen_cross_attention(q, q, q, cu, cu, **options)
    with pytest.raises(error, match=re.escape(message)):
        fastxattn.cross_attention(q[None], q[None], q[None], **options)


@pytest.mark.parametrize("name", ["cu_seqlens_q", "cu_seqlens_k"])
@pytest.mark.parametrize(
    "build",
    [
        lambda q, k: fastxattn.varlen_cross_attention(*[torch.randn(2, 1, 4)] * 3, q, k, causal=True),
        lambda q, k: ranges.causal_kv_range(q, k),
        lambda q, k: ranges.timestamp_kv_range(torch.rand(2), torch.rand(2), q, k, 1.0),
        lambda q, k: ranges.media_kv_range(torch.ones(2).bool(), q if len(k) else k, 3),
    ],
    ids=["causal=", "causal", "timestamp", "media"],
)
def test_offsets_without_one_are_refused(build, name):
    given = {"cu_seqlens_q": offsets([2]), "cu_seqlens_k": offsets([2])}
    given[name] = given[name][:0]
    with pytest.raises(ValueError, match=r"must have shape \(batch \+ 1,\), at least one offset; got none"):
        build(*given.values())


def test_offsets_on_two_devices_are_refused():
    with pytest.raises(ValueError, match="cu_seqlens_k must be on the device of cu_seqlens_q, cpu; got meta"):
        ranges.causal_kv_range(offsets([2]), offsets([2]).to("meta"))


def test_causal_in_a_compiled_program():
    torch._dynamo.reset()
    q, cu = torch.randn(5, 1, 4), offsets([2, 3])
    f = functools.partial(fastxattn.varlen_cross_attention, causal=True, window=1)
    torch.testing.assert_close(torch.compile(f, backend="eager", fullgraph=True)(q, q, q, cu, cu), f(q, q, q, cu, cu))
