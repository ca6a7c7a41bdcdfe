// Selection, quantiles, gathering and merging of rows: one body, compiled per instruction set.
#pragma once

#include "core/cpu/vec.h"
#include "pruning/pruning.h"

namespace fastxattn::FXA_ISA {

using namespace fastxattn::pruning;

// Unsigned integers that order as scores do: NaN lowest, -0 and 0 equal.
FXA_INLINE uint32_t order_key(float score) {
  if (score != score) return 0;
  const uint32_t bits = __builtin_bit_cast(uint32_t, score + 0.0f);
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}
FXA_INLINE float key_score(uint32_t key) { return __builtin_bit_cast(float, key >> 31 ? key & 0x7fffffffu : ~key); }

struct Cut {
  uint32_t key;   // of the last token taken
  int64_t equal;  // how many tokens with exactly this key are taken
};

enum State : uint8_t { kDropped = 0, kKept = 1, kCandidate = 2 };

// Where the best `needed` (> 0) of the candidates end: a radix search from the top byte down.
static Cut cut_at(const uint32_t* keys, const uint8_t* state, int64_t n, int64_t needed) {
  uint32_t prefix = 0, mask = 0;
  for (int shift = 24; shift >= 0; shift -= 8) {
    int32_t counts[256] = {};
    for (int64_t i = 0; i < n; ++i)
      if (state[i] == kCandidate && (keys[i] & mask) == prefix) ++counts[keys[i] >> shift & 255u];
    int digit = 255;
    for (; counts[digit] < needed; --digit) needed -= counts[digit];
    prefix |= static_cast<uint32_t>(digit) << shift;
    mask |= 255u << shift;
  }
  return {prefix, needed};
}

// One sequence. `keys` and `state` are scratch for its tokens.
void pruning_select(const SelectParams& p, int64_t b, uint32_t* keys, uint8_t* state) {
  const int64_t begin = p.cu[b], n = p.cu[b + 1] - begin;
  int64_t needed = p.cu_keep[b + 1] - p.cu_keep[b];
  int64_t guarded = 0;
  for (int64_t i = 0; i < n; ++i) {
    keys[i] = order_key(p.scores[begin + i]);
    state[i] = p.protected_tokens != nullptr && p.protected_tokens[begin + i] ? kCandidate : kDropped;
    guarded += state[i] == kCandidate;
  }
  if (needed >= guarded) {
    // Every protected token stays; the others compete for the rest.
    for (int64_t i = 0; i < n; ++i) state[i] = state[i] == kCandidate ? kKept : kCandidate;
    needed -= guarded;
  }
  Cut cut{0xffffffffu, 0};
  if (needed > 0) cut = cut_at(keys, state, n, needed);
  int32_t place = p.cu_keep[b];
  for (int64_t i = 0; i < n; ++i) {
    bool keep = state[i] == kKept;
    if (state[i] == kCandidate) {
      keep = keys[i] > cut.key;
      if (keys[i] == cut.key && cut.equal > 0) keep = true, --cut.equal;
    }
    p.assignment[begin + i] = keep ? place : -1;
    if (keep) p.keep_index[place++] = static_cast<int32_t>(begin + i);
  }
}

// One sequence. `keys` and `state` are scratch for its tokens.
void pruning_quantile(const QuantileParams& p, int64_t b, uint32_t* keys, uint8_t* state) {
  const int64_t begin = p.cu[b], n = p.cu[b + 1] - begin;
  int64_t numbers = 0;
  for (int64_t i = 0; i < n; ++i) {
    keys[i] = order_key(p.scores[begin + i]);
    state[i] = keys[i] == 0 ? kDropped : kCandidate;
    numbers += keys[i] != 0;
  }
  for (int64_t j = 0; j < p.quantiles; ++j) {
    float value = __builtin_nanf("");
    if (numbers > 0) {
      const double place = p.q[j] * static_cast<double>(numbers - 1);
      const int64_t low = static_cast<int64_t>(place);
      const float share = static_cast<float>(place - static_cast<double>(low));
      value = key_score(cut_at(keys, state, n, numbers - low).key);
      if (share != 0.0f) {
        const float high = key_score(cut_at(keys, state, n, numbers - low - 1).key);
        if (high != value) value = value + (high - value) * share;
      }
    }
    p.out[b * p.quantiles + j] = value;
  }
}

template <class T>
static void scaled_row(const T* from, float c, T* to, int64_t channels) {
  int64_t i = 0;
  for (; i + W <= channels; i += W) store_from_f32(to + i, load_as_f32(from + i) * splat(c));
  for (; i < channels; ++i) to[i] = from_f32<T>(to_f32(from[i]) * c);
}

template <class T>
static void gather_rows(const GatherParams& p, int64_t begin, int64_t end) {
  if (p.channels == 0) return;  // the pointers may be null, which memset and memcpy may not be given
  const T* x = static_cast<const T*>(p.x);
  T* out = static_cast<T*>(p.out);
  for (int64_t j = begin; j < end; ++j) {
    const int64_t from = p.index[j];
    T* to = out + j * p.channels;
    if (from < 0) {
      std::memset(to, 0, static_cast<size_t>(p.channels) * sizeof(T));
    } else if (p.coefficient != nullptr) {
      scaled_row(x + from * p.channels, p.coefficient[j], to, p.channels);
    } else {
      std::memcpy(to, x + from * p.channels, static_cast<size_t>(p.channels) * sizeof(T));
    }
  }
}

void pruning_gather(const GatherParams& p, int64_t begin, int64_t end) {
  if (p.dtype == DType::f32) return gather_rows<float>(p, begin, end);
  if (p.dtype == DType::bf16) return gather_rows<bf16_t>(p, begin, end);
  gather_rows<f16_t>(p, begin, end);
}

template <class T>
static void merge_rows(const MergeParams& p, const int32_t* first, const int32_t* next, int64_t begin, int64_t end) {
  const T* x = static_cast<const T*>(p.x);
  for (int64_t a = begin; a < end; ++a) {
    T* to = static_cast<T*>(p.out) + a * p.channels;
    int64_t c = 0;
    for (; c + W <= p.channels; c += W) {
      vf sum = zero();
      for (int32_t i = first[a]; i >= 0; i = next[i]) {
        const vf row = load_as_f32(x + i * p.channels + c);
        sum = p.coefficient != nullptr ? fma(row, splat(p.coefficient[i]), sum) : sum + row;
      }
      store_from_f32(to + c, sum);
    }
    for (; c < p.channels; ++c) {
      float sum = 0;
      for (int32_t i = first[a]; i >= 0; i = next[i]) {
        sum += to_f32(x[i * p.channels + c]) * (p.coefficient != nullptr ? p.coefficient[i] : 1.0f);
      }
      to[c] = from_f32<T>(sum);
    }
  }
}

// Rows [begin, end) of the result; the members of row a are first[a], next[first[a]], ... up to -1.
void pruning_merge(const MergeParams& p, const int32_t* first, const int32_t* next, int64_t begin, int64_t end) {
  if (p.dtype == DType::f32) return merge_rows<float>(p, first, next, begin, end);
  if (p.dtype == DType::bf16) return merge_rows<bf16_t>(p, first, next, begin, end);
  merge_rows<f16_t>(p, first, next, begin, end);
}

}  // namespace fastxattn::FXA_ISA
