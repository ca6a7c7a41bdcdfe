// What forward and backward share: lanes and keys of an item, their panels, and scores with both softmaxes' biases.
//
// A tile is S[key][lane], as in attention. Lanes read keys: their softmax runs down the tile. Keys read lanes: theirs
// runs across it.
#pragma once

#include "attention/attention_backward.inl"
#include "co_attention/co_attention.h"

namespace fastxattn::FXA_ISA {

inline constexpr float kInfinity = __builtin_inff();

// Scores are compared and exponentiated in units of `unit` natural ones, so that a plain scale costs no pass.
struct ScoreUnits {
  bool capped, negated;
  float scale, cap;
  float unit;  // natural units per score unit

  explicit ScoreUnits(const CoAttentionParams& p)
      : capped(p.softcap > 0.0f),
        negated(!(p.scale > 0.0f)),
        scale(p.scale),
        cap(p.softcap),
        unit(capped || negated ? 1.0f : p.scale) {}

  // Products to scores; `slope` (or null) receives d capped / d uncapped.
  void apply(float* scores, int64_t n, float* slope) const {
    if (capped) {
      const vf uncap = splat(scale / cap);
      for (int64_t i = 0; i < n; i += W) {
        const vf t = tanh(load(scores + i) * uncap);
        if (slope != nullptr) store(slope + i, splat(1.0f) - t * t);
        store(scores + i, t * splat(cap));
      }
    } else if (negated) {
      for (int64_t i = 0; i < n; i += W) store(scores + i, load(scores + i) * splat(scale));
    }
  }
};

// tile[key][lane] = keys . lanes, a long depth in pieces: one chain of additions loses more digits than several.
template <class E>
static void tile_product(int64_t keys, int64_t ld, int64_t depth, const E* a, int64_t lda, const E* b, float* tile) {
  constexpr int64_t kPiece = 128;
  gemm<E, AOrder::rows, Init::zero>(keys, ld, least(depth, kPiece), a, lda, b, ld, tile, ld);
  for (int64_t k = kPiece; k < depth; k += kPiece) {
    gemm<E, AOrder::rows, Init::add>(keys, ld, least(depth - k, kPiece), a + k, lda, b + k * ld, ld, tile, ld);
  }
}

// Addresses of rows [first, first + n) of one head of a (rows, heads, depth) tensor.
template <class T>
static void rows_at(const void* base, int64_t row_stride, int64_t head_stride, int64_t first, int64_t n, int64_t head,
                    const T** at) {
  for (int64_t i = 0; i < n; ++i) at[i] = static_cast<const T*>(base) + (first + i) * row_stride + head * head_stride;
}

// The bias of `n` rows in units of 1 / unit, -inf for the surplus up to `width`: whoever reads a surplus row sees none.
static void bias_of(const CoAttentionSide& side, int64_t first, int64_t n, int64_t width, int64_t head, float unit,
                    float* bias) {
  for (int64_t i = 0; i < width; ++i) {
    const float x =
        side.bias == nullptr || i >= n ? 0.0f : side.bias[(first + i) * side.bias_row + head * side.bias_head];
    bias[i] = i < n ? x / unit : -kInfinity;
  }
}

// Calls f(key, lane offset, keep mask) for every vector of lanes of a tile: the mask of lanes that read keys.
template <class F>
FXA_INLINE void for_lanes_kept(const CoAttentionParams& p, uint64_t seed, int64_t head, int64_t lane_row, int64_t width,
                               int64_t key_slot, int64_t keys, F&& f) {
  for (int64_t i = 0; i < width; i += W) {
    vu row;
    for (int k = 0; k < W; ++k) row[k] = static_cast<uint32_t>(lane_row + i + k);
    for (int64_t j = 0; j < keys; j += 4) {
      vu words[4] = {row, vu{} + static_cast<uint32_t>((key_slot + j) / 4), vu{} + static_cast<uint32_t>(head), vu{}};
      philox(words, seed);
      for (int64_t k = 0; k < 4 && j + k < keys; ++k) {
        const vf uniform = __builtin_convertvector(reinterpret_cast<vi>(words[k] >> 8), vf) * splat(0x1p-24f);
        f(j + k, i, uniform >= splat(p.dropout_p));
      }
    }
  }
}

// The same for keys that read lanes: the lanes' slots are the generator's columns. lane_slot is a multiple of 4.
template <class F>
FXA_INLINE void for_keys_kept(const CoAttentionParams& p, uint64_t seed, int64_t head, int64_t key_row, int64_t keys,
                              int64_t lane_slot, int64_t width, F&& f) {
  for (int64_t j = 0; j < keys; ++j) {
    for (int64_t i = 0; i < width; i += 4 * W) {
      vu four{};
      for (int k = 0; k < W; ++k) four[k] = static_cast<uint32_t>((lane_slot + i) / 4 + k);
      vu words[4] = {vu{} + static_cast<uint32_t>(key_row + j), four, vu{} + static_cast<uint32_t>(head), vu{}};
      philox(words, seed);
      float uniform[4 * W];
      for (int k = 0; k < W; ++k) {
        for (int w = 0; w < 4; ++w) uniform[4 * k + w] = static_cast<float>(words[w][k] >> 8) * 0x1p-24f;
      }
      for (int64_t c = 0; c < 4 * W && i + c < width; c += W) f(j, i + c, load(uniform + c) >= splat(p.dropout_p));
    }
  }
}

// Zeroes what is not kept, and multiplies the rest.
struct KeepScaled {
  float* tile;
  int64_t ld;
  float factor;

  void operator()(int64_t key, int64_t lane, vi keep) const {
    float* at = tile + key * ld + lane;
    store(at, keep ? load(at) * splat(factor) : zero());
  }
};

static inline float keep_factor(const CoAttentionParams& p) {
  return p.dropout_p < 1.0f ? 1.0f / (1.0f - p.dropout_p) : 0.0f;
}

}  // namespace fastxattn::FXA_ISA
