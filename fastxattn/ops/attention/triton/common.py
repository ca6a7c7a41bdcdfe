"""Device functions that every attention kernel shares.

A kernel works on one *tile*: a block of rows of one sequence and one key/value head. With grouped heads a row is a
(query, head of the group) pair, query-major, so that keys and values are read once for the whole group and gradients
of a shared head are summed by the matrix product itself.

The list of tiles is never built: sequence ``b`` owns the tile numbers from ``cu[b] * GROUP // BLOCK + b`` on, which
leaves space for ``ceil(length * GROUP / BLOCK)`` of them whatever the offsets are. The number of tiles is therefore
known from shapes alone (``slots * GROUP // BLOCK + batch``), a kernel finds its sequence by bisection, and the
hardware's own scheduler balances ragged batches. At most one tile per sequence is empty and returns at once.

Scores are kept in units that :func:`unit_of` chooses: of log2 for 16-bit inputs, so that the exponential is one
instruction, and natural for float32, where the rounding of that factor would show.
"""

# mypy: ignore-errors
from __future__ import annotations

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))
LOG2E = tl.constexpr(1.4426950408889634)
LN2_HIGH = tl.constexpr(0.693145751953125)  # 16 bits: its products with whole numbers are exact
LN2_LOW = tl.constexpr(1.42860676533018704e-06)


@triton.constexpr_function
def unit_of(dtype):
    """How many score units make one natural unit."""
    return 1.0 if dtype == tl.float32 else 1.4426950408889634


@triton.jit
def power(b_x, UNIT: tl.constexpr):
    """E to the power of scores in these units.

    Natural ones are reduced by ln 2 and take a polynomial, as a rounded x log2(e) shows, and a GPU's exponential, which
    is right to 2 units of rounding, does too. That of a whole number is exact.
    """
    if UNIT == 1.0:
        b_x = tl.where(b_x < -104.0, -104.0, b_x)  # 0 from here on; the order keeps NaN
        b_whole = tl.floor(b_x * LOG2E + 0.5)
        b_x = (b_x - b_whole * LN2_HIGH) - b_whole * LN2_LOW
        b_y = 0.0013934544986113906 * b_x + 0.008363776840269566
        b_y = b_y * b_x + 0.04166645556688309
        b_y = b_y * b_x + 0.16666573286056519
        b_y = b_y * b_x + 0.5
        return (1.0 + (b_y * (b_x * b_x) + b_x)) * tl.exp2(b_whole)
    return tl.exp2(b_x)


@triton.jit
def narrow(b_x, DTYPE: tl.constexpr):
    """Float32 to a narrower type, to nearest even; the interpreter truncates to bfloat16, so it is led there."""
    if INTERPRETED and tl.bfloat16 == DTYPE:
        b_bits = b_x.to(tl.uint32, bitcast=True)
        b_bits = (b_bits + 0x7FFF + ((b_bits >> 16) & 1)) & 0xFFFF0000
        b_x = tl.where(b_x == b_x, b_bits.to(tl.float32, bitcast=True), b_x)
    return b_x.to(DTYPE)


@triton.jit
def dot(b_a, b_b, b_acc, PRECISION: tl.constexpr):
    """b_acc + b_a @ b_b in float32; the interpreter multiplies 16-bit floats wrongly, so they are widened there."""
    if INTERPRETED:
        b_a = b_a.to(tl.float32)
        b_b = b_b.to(tl.float32)
    if b_acc is None:
        return tl.dot(b_a, b_b, input_precision=PRECISION)
    return tl.dot(b_a, b_b, b_acc, input_precision=PRECISION)


@triton.jit
def chained(b_rows, b_keys, CHAINS: tl.constexpr, PRECISION: tl.constexpr):
    """b_rows @ b_keys^T from up to CHAINS chains of additions, none shorter than 16."""
    if CHAINS > 1 and b_rows.shape[1] >= 32:
        b_rows_0, b_rows_1 = tl.split(tl.reshape(b_rows, (b_rows.shape[0], b_rows.shape[1] // 2, 2)))
        b_keys_0, b_keys_1 = tl.split(tl.reshape(b_keys, (b_keys.shape[0], b_keys.shape[1] // 2, 2)))
        # Subtracted: the compiler would fold an addition into one chain again.
        b_other = chained(-b_rows_1, b_keys_1, CHAINS // 2, PRECISION)
        return chained(b_rows_0, b_keys_0, CHAINS // 2, PRECISION) - b_other
    return dot(b_rows, tl.trans(b_keys), None, PRECISION)


@triton.jit
def rows_by_keys(b_rows, b_keys, EXACT: tl.constexpr, PRECISION: tl.constexpr):
    """b_rows @ b_keys^T, with EXACT from several chains of additions, which lose fewer digits than one.

    In chains of 16, except where only two of them leave dK and dV in registers.
    """
    CHAINS: tl.constexpr = 2 if b_rows.shape[1] == 128 else 16
    return chained(b_rows, b_keys, CHAINS if EXACT else 1, PRECISION)


@triton.jit
def across(b_keys, b_rows, EXACT: tl.constexpr, PRECISION: tl.constexpr):
    """b_keys @ b_rows^T, with EXACT rounded as the passes by rows round it: what cancels there must cancel here."""
    if EXACT:
        return tl.trans(rows_by_keys(b_rows, b_keys, True, PRECISION))
    return dot(b_keys, tl.trans(b_rows), None, PRECISION)


@triton.jit
def dot_seen(b_a, b_x, b_acc, m_seen, GUARD: tl.constexpr, PRECISION: tl.constexpr):
    """b_acc + b_a @ b_x where b_a is zero outside m_seen, and a NaN or infinity of b_x reaches only who sees it.

    Zero times NaN is NaN, so rows of b_x that are not finite leave the product and are added one by one, to those who
    see them. Without GUARD everybody in the tile sees every row.
    """
    if GUARD:
        m_bad = tl.max(((b_x - b_x) != 0).to(tl.int32), 1)
        if tl.max(m_bad, 0) > 0:
            o_j = tl.arange(0, b_x.shape[0])
            for i_j in range(0, b_x.shape[0]):
                m_j = (o_j == i_j) & (m_bad > 0)
                b_row = tl.sum(tl.where(m_j[:, None], b_x, 0.0).to(tl.float32), 0)
                b_column = tl.sum(tl.where(m_j[None, :], b_a, 0.0), 1)
                m_hit = tl.max((m_seen & m_j[None, :]).to(tl.int32), 1) > 0
                b_acc = tl.where(m_hit[:, None], b_acc + b_column[:, None] * b_row[None, :], b_acc)
            b_x = tl.where(m_bad[:, None] > 0, 0.0, b_x).to(b_x.dtype)
    return dot(narrow(b_a, b_x.dtype), b_x, b_acc, PRECISION)


@triton.jit
def find_sequence(p_cu, batch, i_tile, GROUP: tl.constexpr, BLOCK: tl.constexpr):
    """The sequence that tile number i_tile belongs to, and the number of the tile within it, at most i_tile.

    Negative where the first offset is beyond the tile, which happens with wrong offsets alone.
    """
    i_low = 0
    i_high = batch
    while i_high - i_low > 1:
        i_mid = (i_low + i_high) // 2
        ahead = tl.load(p_cu + i_mid).to(tl.int64) * GROUP // BLOCK + i_mid <= i_tile
        i_low = tl.where(ahead, i_mid, i_low)
        i_high = tl.where(ahead, i_high, i_mid)
    first = tl.maximum(tl.load(p_cu + i_low), 0).to(tl.int64) * GROUP // BLOCK + i_low
    return i_low, tl.maximum(i_tile - first, -1).to(tl.int32)


@triton.jit
def find_span(p_cu, p_used, slots, i_b):
    """First slot and number of slots of sequence i_b, clamped to the slots there are."""
    start = tl.load(p_cu + i_b)
    end = tl.load(p_cu + i_b + 1)
    start = tl.minimum(tl.maximum(start, 0), slots)
    length = tl.minimum(tl.maximum(end, start), slots) - start
    if p_used is not None:
        length = tl.minimum(length, tl.maximum(tl.load(p_used + i_b), 0))
    return start, length


@triton.jit
def find_rows(p_index, o_slot, rows, m_slot):
    """The rows that slots stand for, clamped to the rows there are (offsets are int32, so rows fit too)."""
    if p_index is not None:
        o_slot = tl.load(p_index + o_slot, mask=m_slot, other=0)
    return tl.minimum(tl.maximum(o_slot, 0), rows - 1)


@triton.jit
def find_places(p_bias, o_row, start, rows, batch):
    """Where rows stand in their sequence of the padded layout, clamped to the places there are if a bias has them."""
    o_place = o_row - start
    if p_bias is not None:
        o_place = tl.minimum(tl.maximum(o_place, 0), tl.maximum(rows // batch, 1) - 1)
    return o_place


@triton.jit
def load_rows(p_x, o_row, stride_row, m_row, MASKED: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Rows of a matrix whose last axis is contiguous, as a [len(o_row), BLOCK] block with zeros outside."""
    o_d = tl.arange(0, BLOCK)
    p_x = p_x + o_row.to(tl.int64)[:, None] * stride_row + o_d[None, :]
    if MASKED:
        return tl.load(p_x, mask=m_row[:, None] & (o_d < WIDTH)[None, :], other=0.0)
    if WIDTH < BLOCK:
        return tl.load(p_x, mask=(o_d < WIDTH)[None, :], other=0.0)
    return tl.load(p_x)


@triton.jit
def load_ranges(p_range, o_row, m_row, length_k):
    """Visible key slots [start, end) by row; empty ranges and absent rows come back as [length_k, 0)."""
    p_range += o_row.to(tl.int64) * 2
    b_start = tl.load(p_range, mask=m_row, other=0)
    b_end = tl.load(p_range + 1, mask=m_row, other=0)
    b_start = tl.maximum(b_start, 0)
    b_end = tl.minimum(b_end, length_k)
    m_some = b_start < b_end
    return tl.where(m_some, b_start, length_k), tl.where(m_some, b_end, 0)


@triton.jit
def chunk_of(length_k, SPLITS: tl.constexpr, SPLIT_KEYS: tl.constexpr, BLOCK_N: tl.constexpr):
    """Keys per chunk: SPLIT_KEYS, or more when SPLITS chunks of that size do not reach the end of the sequence."""
    return tl.maximum(SPLIT_KEYS, tl.cdiv(tl.cdiv(length_k, SPLITS), BLOCK_N) * BLOCK_N)


@triton.jit
def find_tile(
    p_cu_q, p_cu_k, p_used_q, p_used_k, p_index_q, rows_q, slots_q, slots_k, batch, kv_heads,
    GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SPLITS: tl.constexpr, SPLIT_KEYS: tl.constexpr,
):  # fmt: skip
    """What a program that is a (tile of rows, key/value head, chunk of keys) works on, and whether it is nothing.

    Returns that flag, sequence, key/value head, chunk number and size, first slot of the queries, of the keys and
    number of keys, then by row: presence, head and row.
    """
    i_program = tl.program_id(0)
    i_split = i_program % SPLITS
    i_kv = i_program // SPLITS % kv_heads
    i_b, i_block = find_sequence(p_cu_q, batch, i_program // SPLITS // kv_heads, GROUP, BLOCK_M)
    start_q, length_q = find_span(p_cu_q, p_used_q, slots_q, i_b)
    length_q = tl.where(i_block < 0, 0, length_q)
    i_block = tl.maximum(i_block, 0)
    start_k, length_k = find_span(p_cu_k, p_used_k, slots_k, i_b)
    chunk = chunk_of(length_k, SPLITS, SPLIT_KEYS, BLOCK_N)
    nothing = (i_block * BLOCK_M >= length_q * GROUP) | ((i_split > 0) & (i_split * chunk >= length_k))
    o_m = i_block * BLOCK_M + tl.arange(0, BLOCK_M)
    m_m = o_m < length_q * GROUP
    o_row = find_rows(p_index_q, start_q + o_m // GROUP, rows_q, m_m)
    return nothing, i_b, i_kv, i_split, chunk, start_q, start_k, length_k, m_m, i_kv * GROUP + o_m % GROUP, o_row


@triton.jit
def span_of_keys(p_range, o_row, m_m, length_k, chunk, i_split, SPLITS: tl.constexpr, BLOCK_N: tl.constexpr):
    """The keys [i_low, i_high) this program walks, and the range of each row."""
    i_low = 0
    i_high = length_k
    b_start = 0
    b_end = 0
    if p_range is not None:
        b_start, b_end = load_ranges(p_range, o_row, m_m, length_k)
        i_low = tl.min(b_start, 0) // BLOCK_N * BLOCK_N
        i_high = tl.max(b_end, 0)
    if SPLITS > 1:
        i_low = tl.maximum(i_low, i_split * chunk)
        i_high = tl.minimum(i_high, (i_split + 1) * chunk)
    return i_low, i_high, b_start, b_end


@triton.jit
def log_sum_exp(b_max, b_sum, DTYPE: tl.constexpr):
    """The logarithm of b_sum * exp(b_max) in DTYPE; -inf where nothing was summed."""
    m_none = b_sum == 0.0
    b_log = tl.log(tl.where(m_none, 1.0, b_sum).to(DTYPE))
    return tl.where(m_none, float("-inf"), b_max.to(DTYPE) + b_log)


@triton.jit
def tanh(b_x):
    """Hyperbolic tangent to float32 precision: a polynomial near 0 (Cephes), exponentials elsewhere."""
    b_z = b_x * b_x
    b_poly = -5.70498872745e-3 * b_z + 2.06390887954e-2
    b_poly = b_poly * b_z - 5.37397155531e-2
    b_poly = b_poly * b_z + 1.33314422036e-1
    b_poly = b_poly * b_z - 3.33332819422e-1
    b_poly = b_poly * b_z * b_x + b_x
    b_far = 1.0 - 2.0 / (tl.exp2(b_x * (2.0 * LOG2E)) + 1.0)
    return tl.where(tl.abs(b_x) < 0.625, b_poly, b_far)


@triton.jit
def adjust_scores(
    b_s, p_key_bias, p_bias, o_row_q, o_row_k, o_pos_q, o_pos_k, o_head, m_pair,
    stride_key_bias, stride_bias_q, stride_bias_k, stride_bias_h,
    scale, softcap, UNIT: tl.constexpr, SOFTCAP: tl.constexpr, KEY_BIAS_HEADS: tl.constexpr,
):  # fmt: skip
    """Products to scores, and tanh of the cap when there is one (else a placeholder).

    Everything about rows and keys comes as two-dimensional offsets that broadcast against b_s, so either axis of b_s
    may be the keys. p_bias points at the sequence's own plane.
    """
    b_tanh = 0.0
    if SOFTCAP:
        b_tanh = tanh(b_s * (scale / softcap))
        b_s = b_tanh * (softcap * UNIT)
    else:
        b_s = b_s * (scale * UNIT)
    if p_key_bias is not None:
        if KEY_BIAS_HEADS:
            b_s += UNIT * tl.load(p_key_bias + o_row_k.to(tl.int64) * stride_key_bias + o_head, mask=m_pair, other=0.0)
        else:
            b_s += UNIT * tl.load(p_key_bias + o_row_k.to(tl.int64) * stride_key_bias)
    if p_bias is not None:
        o_bias = o_head.to(tl.int64) * stride_bias_h + o_pos_q.to(tl.int64) * stride_bias_q
        o_bias = o_bias + o_pos_k.to(tl.int64) * stride_bias_k
        b_s += UNIT * tl.load(p_bias + o_bias, mask=m_pair, other=0.0).to(tl.float32)
    return b_s, b_tanh


@triton.jit
def keep_mask(p_seed, o_row, i_first_key, o_head, dropout_p, BLOCK_K: tl.constexpr):
    """Which weights dropout keeps, [len(o_row), BLOCK_K]: one Philox call for every four consecutive keys."""
    o_four = i_first_key // 4 + tl.arange(0, BLOCK_K // 4)
    b_zero = (o_row[:, None] * 0 + o_four[None, :] * 0).to(tl.uint32)
    b_row = b_zero + o_row[:, None].to(tl.uint32)
    b_four = b_zero + o_four[None, :].to(tl.uint32)
    b_head = b_zero + o_head[:, None].to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(tl.load(p_seed), b_row, b_four, b_head, b_zero)
    b_words = tl.join(tl.join(w0, w2), tl.join(w1, w3))
    b_words = tl.reshape(b_words, (o_row.shape[0], BLOCK_K))
    return (b_words >> 8).to(tl.float32) * 5.9604644775390625e-08 >= dropout_p


@triton.jit
def keep_mask_scattered(p_seed, o_row, o_slot, o_head, dropout_p):
    """keep_mask for keys that are not neighbours: one Philox call per weight."""
    b_zero = (o_row[:, None] * 0 + o_slot[None, :] * 0).to(tl.uint32)
    b_slot = b_zero + o_slot[None, :].to(tl.uint32)
    b_row = b_zero + o_row[:, None].to(tl.uint32)
    b_head = b_zero + o_head[:, None].to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(tl.load(p_seed), b_row, b_slot // 4, b_head, b_zero)
    b_word = tl.where(b_slot % 4 < 2, tl.where(b_slot % 4 == 0, w0, w1), tl.where(b_slot % 4 == 2, w2, w3))
    return (b_word >> 8).to(tl.float32) * 5.9604644775390625e-08 >= dropout_p
