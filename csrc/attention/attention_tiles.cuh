// What the attention kernels share: how tiles of rows are numbered, which keys a row sees, and scores.
//
// A forward or dQ tile is a block of rows of one sequence and one key/value head, a row being a (query, head of the
// group) pair, query-major, so that keys are read once for the whole group. The list of tiles is never built: sequence
// b owns the tile numbers from cu[b] * group / block + b on, enough for the ceil(length * group / block) of them
// whatever the offsets are. The number of tiles follows from shapes alone, and a block finds its sequence by bisection.
#pragma once

#include "attention/attention_cuda.h"
#include "core/cuda/matrix.cuh"

namespace fastxattn::attention {

using namespace gpu;

inline constexpr float kLog2e = 1.4426950408889634f, kLog2eLow = 1.925963033500912e-8f, kLn2 = 0.6931471805599453f;
inline constexpr float kInfinity = __builtin_huge_valf();

inline int64_t tile_count(int slots, int batch, int group, int block) {
  return static_cast<int64_t>(slots) * group / block + batch;
}

// The last sequence that starts at or before what is looked for, by bisection; the first if none does.
template <class Starts>
FXA_DEVICE int last_sequence(int batch, Starts starts) {
  int low = 0, high = batch;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    (starts(middle) ? low : high) = middle;
  }
  return low;
}

// The sequence that a tile number belongs to, and the number of the tile within it, at most `tile`; negative where the
// first offset is beyond the tile, which happens with wrong offsets alone.
struct TileOf {
  int sequence, number;
};
FXA_DEVICE TileOf find_sequence(const int32_t* cu, int batch, int tile, int group, int block) {
  const auto first = [&](int b) { return static_cast<int64_t>(maximum(load_global(cu + b), 0)) * group / block + b; };
  const int sequence = last_sequence(batch, [&](int b) { return first(b) <= tile; });
  return {sequence, first(sequence) <= tile ? static_cast<int>(tile - first(sequence)) : -1};
}

// A sequence's slots in use, clamped to the slots there are.
struct Span {
  int first, count;
};
FXA_DEVICE Span find_span(const int32_t* cu, const int32_t* used, int slots, int sequence) {
  const int first = minimum(maximum(load_global(cu + sequence), 0), slots);
  const int end = minimum(maximum(load_global(cu + sequence + 1), first), slots);
  int count = end - first;
  if (used != nullptr) count = minimum(count, maximum(load_global(used + sequence), 0));
  return {first, count};
}
FXA_DEVICE int find_row(const int32_t* index, int slot, int rows) {
  if (index != nullptr) slot = load_global(index + slot);
  return minimum(maximum(slot, 0), rows - 1);
}

// Sequences of so few rows waste most of a larger tile.
inline constexpr int kFewRows = 16;

// Whether a sequence's keys are cut into chunks, by its rows (queries x group) and keys.
FXA_DEVICE bool is_cut(const AttentionKernelParams& p, int rows, int keys) {
  return p.chunks > 0 && rows <= kCutRows && keys >= kCutLength;
}
// Places of chunks that such a sequence has; it may leave the last ones empty.
FXA_DEVICE int chunk_places(int keys) { return minimum(keys / kChunkKeys, kMostChunks); }
// Keys per chunk, whole tiles of them.
FXA_DEVICE int chunk_keys(int keys, int tile) {
  const int places = chunk_places(keys);
  return ((keys + places - 1) / places + tile - 1) / tile * tile;
}
// The sequence that a place belongs to, if its keys are cut: the next one begins two places later at least.
FXA_DEVICE int find_cut(const AttentionKernelParams& p, int place) {
  return last_sequence(p.batch, [&](int b) { return load_global(p.cu_k + b) / kChunkKeys <= place; });
}

// Visible key slots [start, end) of a row; nothing is [keys, 0).
struct Range {
  int start, end;
  FXA_DEVICE bool sees(int key) const { return key >= start && key < end; }
};
FXA_DEVICE Range find_range(const int32_t* kv_range, int row, int keys) {
  if (kv_range == nullptr) return keys > 0 ? Range{0, keys} : Range{keys, 0};
  const U2 pair = load_global(reinterpret_cast<const U2*>(kv_range) + row);
  const Range r{maximum(static_cast<int>(pair.x), 0), minimum(static_cast<int>(pair.y), keys)};
  return r.start < r.end ? r : Range{keys, 0};
}

// Keys that the rows of a block see: any of them in [low, high), all of them in [all_low, all_high). Uses 16 bytes of
// shared memory; every thread brings two rows' ranges and whether the rows are there.
struct Window {
  int low, high, all_low, all_high;
};
FXA_DEVICE Window find_window(Shared<int> scratch, const Range (&range)[2], const bool (&there)[2], int keys) {
  if (thread_index() == 0) {
    scratch.store(0, keys);
    scratch.store(1, 0);
    scratch.store(2, 0);
    scratch.store(3, keys);
  }
  sync_threads();
  if (lane_index() % 4 == 0) {
    for (int half = 0; half < 2; ++half) {
      if (!there[half]) continue;
      atomic_min(scratch, 0, range[half].start);
      atomic_max(scratch, 1, range[half].end);
      atomic_max(scratch, 2, range[half].start);
      atomic_min(scratch, 3, range[half].end);
    }
  }
  sync_threads();
  return {scratch.load(0), scratch.load(1), scratch.load(2), scratch.load(3)};
}

// Scores are kept in units of log2 for 16-bit inputs, so that the exponential is one instruction, and natural for
// float32, where the rounding of that factor would show.
template <class T>
inline constexpr float kUnit = sizeof(T) == 4 ? 1.0f : kLog2e;

// e to the power of a score in these units.
template <class T>
FXA_DEVICE float power(float x) {
  if constexpr (sizeof(T) != 4) {
    return fast_exp2(x);
  } else {
    x = x < -150.0f ? -150.0f : x;  // keeps infinity out of the correction below; the result is 0 as it should be
    const float main = x * kLog2e;
    const float rest = fused(x, kLog2eLow, fused(x, kLog2e, -main));
    const float y = fast_exp2(main);
    return fused(y * rest, kLn2, y);
  }
}

// Hyperbolic tangent to float32 precision: a polynomial near 0 (Cephes), exponentials elsewhere.
FXA_DEVICE float tanh_of(float x) {
  const float z = x * x;
  float poly = fused(z, -5.70498872745e-3f, 2.06390887954e-2f);
  poly = fused(poly, z, -5.37397155531e-2f);
  poly = fused(poly, z, 1.33314422036e-1f);
  poly = fused(poly, z, -3.33332819422e-1f);
  poly = fused(poly * z, x, x);
  const float far = 1.0f - 2.0f / (fast_exp2(x * (2.0f * kLog2e)) + 1.0f);
  return (x < 0.0f ? -x : x) < 0.625f ? poly : far;
}

// Whether scores go through scale_scores whole, or stay raw with the scale folded into the exponent.
inline bool scales_scores(const AttentionKernelParams& p) { return p.softcap != 0.0f || !(p.scale > 0.0f); }

// Products to scores in units of T: scale and cap. `slope`, unless null, gets the cap's derivative.
template <class T, int N>
FXA_DEVICE void scale_scores(const AttentionKernelParams& p, float (&s)[N][4], float (*slope)[4]) {
  if (p.softcap != 0.0f) {
    FXA_UNROLL
    for (int i = 0; i < N * 4; ++i) {
      const float t = tanh_of(s[i / 4][i % 4] * (p.scale / p.softcap));
      if (slope != nullptr) slope[i / 4][i % 4] = 1.0f - t * t;
      s[i / 4][i % 4] = t * (p.softcap * kUnit<T>);
    }
  } else {
    FXA_UNROLL
    for (int i = 0; i < N * 4; ++i) {
      if (slope != nullptr) slope[i / 4][i % 4] = 1.0f;
      s[i / 4][i % 4] *= p.scale * kUnit<T>;
    }
  }
}

// Where the biases of a key slot lie, or null past the last slot.
FXA_DEVICE const float* key_bias_row(const AttentionKernelParams& p, const Span& keys, int key) {
  if (key >= keys.count) return nullptr;
  return p.key_bias + find_row(p.index_k, keys.first + key, p.rows_k) * p.key_bias_row;
}

// Columns (2t, 2t + 1 of every block of eight) that a lane holds of an accumulator.
FXA_DEVICE int column_of(int block, int e) { return block * 8 + lane_index() % 4 * 2 + e % 2; }

// Adds the keys' biases to scores of the thread's two rows, which belong to these heads.
template <class T, int N>
FXA_DEVICE void add_key_bias(const AttentionKernelParams& p, const Span& keys, int first, const int (&head)[2],
                             float (&s)[N][4]) {
  FXA_UNROLL
  for (int n = 0; n < N; ++n) {
    FXA_UNROLL
    for (int c = 0; c < 2; ++c) {
      const float* biases = key_bias_row(p, keys, first + column_of(n, c));
      if (biases == nullptr) continue;
      const float own = load_global(biases + head[0] * p.key_bias_head);
      const float other = p.key_bias_head == 0 ? own : load_global(biases + head[1] * p.key_bias_head);
      s[n][c] = fused(own, kUnit<T>, s[n][c]);
      s[n][2 + c] = fused(other, kUnit<T>, s[n][2 + c]);
    }
  }
}

template <class V>
FXA_DEVICE V quad_sum(V x) {  // over the four lanes that share a row
  x += shuffle_xor(x, 1);
  return x + shuffle_xor(x, 2);
}
FXA_DEVICE float quad_max(float x) {
  x = maximum(x, shuffle_xor(x, 1));
  return maximum(x, shuffle_xor(x, 2));
}

// One step of the online softmax: products of a tile become weights relative to the largest score so far of each of the
// thread's two rows. `factor`: from products to units of T; `sum`: of the weights in this lane's columns; `shrinks`:
// what earlier weights, and sums with them, are to be multiplied by.
template <class T, int N>
FXA_DEVICE void soften(float (&s)[N][4], float factor, float (&top)[2], float (&sum)[2], float (&shrinks)[2]) {
  FXA_UNROLL
  for (int half = 0; half < 2; ++half) {
    float most = -kInfinity;
    FXA_UNROLL
    for (int n = 0; n < N; ++n) most = maximum(most, maximum(s[n][2 * half], s[n][2 * half + 1]));
    const float next = maximum(top[half], quad_max(most) * factor);
    const float base = next == -kInfinity ? 0.0f : next;
    const float shrink = power<T>(top[half] - base);
    top[half] = next;
    sum[half] *= shrink;
    shrinks[half] = shrink;
    FXA_UNROLL
    for (int n = 0; n < N; ++n) {
      FXA_UNROLL
      for (int e = 2 * half; e < 2 * half + 2; ++e) {
        s[n][e] = power<T>(fused(s[n][e], factor, -base));
        sum[half] += s[n][e];
      }
    }
  }
}

// Scales accumulators. Once the largest score has been seen, which is soon, there is nothing to do.
template <int N>
FXA_DEVICE void shrink_rows(float (&acc)[N][4], const float (&shrinks)[2]) {
  if (any(!(shrinks[0] == 1.0f && shrinks[1] == 1.0f))) {
    FXA_UNROLL
    for (int i = 0; i < N * 4; ++i) acc[i / 4][i % 4] *= shrinks[i % 4 / 2];
  }
}

// Log-sum-exp of a row from its largest score, in units of T, and the sum of its weights.
template <class T>
FXA_DEVICE float lse_of(float top, float total) {
  return total == 0.0f ? -kInfinity : top * (1.0f / kUnit<T>)+accurate_log(total);
}

// One row of accumulators (half 0 or 1 of the thread's two) times a factor to memory, columns below `width`.
template <class V, int N>
FXA_DEVICE void store_row(V* row, const float (&c)[N][4], int half, float factor, int width) {
  FXA_UNROLL
  for (int n = 0; n < N; ++n) {
    const int column = column_of(n, 0);
    const float x = c[n][2 * half] * factor, y = c[n][2 * half + 1] * factor;
    if (width % 2 == 0) {  // rows start at multiples of their width
      if (column >= width) continue;
      if constexpr (sizeof(V) == 4) {
        store_global(reinterpret_cast<U2*>(row + column), U2{bits_of(x), bits_of(y)});
      } else {
        store_global(reinterpret_cast<uint32_t*>(row + column), pack<V>(x, y));
      }
    } else {
      if (column < width) store_global(row + column, from_float<V>(x));
      if (column + 1 < width) store_global(row + column + 1, from_float<V>(y));
    }
  }
}

}  // namespace fastxattn::attention
