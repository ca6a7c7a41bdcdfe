// Gradients of late interaction, without atomics: every sum is one thread's, in one order.
//
// Of maxima they are sparse: a token gets its best match in every set of the other side, and every token whose best
// match it is. Of smooth maxima every pair of tokens counts: their weights go into a window, as the slopes of the
// contrastive losses do.
#pragma once

#include "core/cuda/math.cuh"
#include "core/cuda/tile.cuh"
#include "late_interaction/late_interaction_cuda.h"

namespace fastxattn::gpu {

// Four features in float32, those beyond `count` zero. Aligned rows have four or none.
template <class T>
FXA_DEVICE void load_features(const T* from, int64_t count, bool aligned, float (&to)[4]) {
  if (!aligned || count <= 0) {
    FXA_UNROLL
    for (int k = 0; k < 4; ++k) to[k] = k < count ? to_float(load_global(from + k)) : 0.0f;
  } else if constexpr (sizeof(T) == 2) {
    const U2 bits = load_global(reinterpret_cast<const U2*>(from));
    to[0] = unpack_low<T>(bits.x), to[1] = unpack_high<T>(bits.x);
    to[2] = unpack_low<T>(bits.y), to[3] = unpack_high<T>(bits.y);
  } else {
    const U4 bits = load_global(reinterpret_cast<const U4*>(from));
    to[0] = float_of(bits.x), to[1] = float_of(bits.y), to[2] = float_of(bits.z), to[3] = float_of(bits.w);
  }
}

// Sums of a warp's tokens of x: rows of y times weights. A lane owns four features.
template <class T>
struct TokenSums {
  const T* y;
  int64_t d, feature;
  bool aligned;
  Shared<float> sums;  // [kGradientRows][kGradientFeatures] from this lane's features on

  // Adds weight * y[token] to a row, for every lane that has one, in the order of lanes: four loads are under way.
  FXA_DEVICE void add(bool hit, int row, int token, float weight) const {
    constexpr int kBatch = 4;
    uint32_t left = ballot(hit);
    while (left != 0) {
      float values[kBatch][4], weights[kBatch];
      int rows[kBatch];
      FXA_UNROLL
      for (int b = 0; b < kBatch; ++b) {
        const bool some = left != 0;
        const int lane = some ? find_first(left) - 1 : 0;
        left &= left - 1;
        const int64_t from = shuffle(token, lane);
        rows[b] = some ? shuffle(row, lane) : -1;
        weights[b] = shuffle(weight, lane);
        if (some) load_features(y + from * d + feature, d - feature, aligned, values[b]);
      }
      FXA_UNROLL
      for (int b = 0; b < kBatch; ++b) {
        if (rows[b] < 0) continue;
        U4 sum = sums.template load_as<U4>(rows[b] * kGradientFeatures);
        sum.x = bits_of(fused(weights[b], values[b][0], float_of(sum.x)));
        sum.y = bits_of(fused(weights[b], values[b][1], float_of(sum.y)));
        sum.z = bits_of(fused(weights[b], values[b][2], float_of(sum.z)));
        sum.w = bits_of(fused(weights[b], values[b][3], float_of(sum.w)));
        sums.template store_as<U4>(rows[b] * kGradientFeatures, sum);
      }
    }
  }
};

// Whether a number that memory holds is an index of something with `size` elements. Sums of two such numbers may
// overflow, which unsigned ones may.
FXA_DEVICE bool within(int i, int size) { return static_cast<uint32_t>(i) < static_cast<uint32_t>(size); }
FXA_DEVICE int sum_of(int x, int y) { return static_cast<int>(static_cast<uint32_t>(x) + static_cast<uint32_t>(y)); }

// The gradient of the scores of pair (set n of x, set m of y), summed over tokens of `side`.
FXA_DEVICE float pair_gradient(const LateInteractionGradientCuda& p, const TokenGradientSide& side, int n, int m) {
  return load_global(side.grad + n * p.x.stride + m * p.y.stride);
}

template <class T>
FXA_KERNEL(kGradientThreads, 4)
maxsim_gradient_kernel(FXA_PARAMS LateInteractionGradientCuda p) {
  const int lane = lane_index(), warp = warp_index(), share = block_index_y();
  const int chunks = static_cast<int>((p.d + kGradientFeatures - 1) / kGradientFeatures);
  const int row0 = block_index() / chunks * kGradientTile + warp * kGradientRows;
  const int rows = minimum(p.x.tokens - row0, kGradientRows);
  const int64_t feature = block_index() % chunks * kGradientFeatures + lane * 4;
  const TokenSums<T> sums{static_cast<const T*>(p.y.data), p.d, feature, p.aligned,
                          shared_memory<float>(0).at(warp * kGradientRows * kGradientFeatures + lane * 4)};
  for (int r = 0; r < rows; ++r) sums.sums.template store_as<U4>(r * kGradientFeatures, U4{0, 0, 0, 0});
  // A weight of zero adds nothing, whatever the row holds: a NaN in it has reached the score alone.

  const int sets = (p.y.sets + p.shares - 1) / p.shares, last_set = minimum((share + 1) * sets, p.y.sets);
  for (int r = 0; r < rows && p.x.best != nullptr; ++r) {
    const int n = load_global(p.x.set + row0 + r);
    if (!within(n, p.x.sets)) continue;
    const int32_t* best = static_cast<const int32_t*>(p.x.best) + static_cast<int64_t>(row0 + r) * p.y.sets;
    for (int first = share * sets; first < last_set; first += 32) {
      const int m = first + lane, place = m < last_set ? load_global(best + m) : -1;
      const float weight = place >= 0 ? pair_gradient(p, p.x, n, m) : 0.0f;
      const int token = place >= 0 ? sum_of(load_global(p.y.cu + m), place) : 0;
      sums.add(weight != 0.0f && within(token, p.y.tokens), r, token, weight);
    }
  }

  const int tokens = (p.y.tokens + p.shares - 1) / p.shares, last_token = minimum((share + 1) * tokens, p.y.tokens);
  for (int r = 0, next; r < rows && p.y.best != nullptr; r = next) {
    const int n = load_global(p.x.set + row0 + r);
    for (next = r + 1; next < rows && load_global(p.x.set + row0 + next) == n;) ++next;
    if (!within(n, p.x.sets)) continue;
    const int32_t* best = static_cast<const int32_t*>(p.y.best) + static_cast<int64_t>(n) * p.y.tokens;
    const int begin = sum_of(load_global(p.x.cu + n), -row0);
    for (int first = share * tokens; first < last_token; first += 32) {
      const int token = first + lane, place = token < last_token ? load_global(best + token) : -1;
      const int row = place >= 0 ? sum_of(begin, place) : -1;
      const int m = row >= r && row < next ? load_global(p.y.set + token) : p.y.sets;
      const float weight = within(m, p.y.sets) ? pair_gradient(p, p.y, n, m) : 0.0f;
      sums.add(weight != 0.0f, row, token, weight);
    }
  }

  for (int r = 0; r < rows; ++r) {
    float* out = p.out + (static_cast<int64_t>(share) * p.x.tokens + row0 + r) * p.d + feature;
    const U4 sum = sums.sums.template load_as<U4>(r * kGradientFeatures);
    if (p.aligned && feature < p.d) {
      store_global(reinterpret_cast<U4*>(out), sum);
      continue;
    }
    const uint32_t parts[4] = {sum.x, sum.y, sum.z, sum.w};
    FXA_UNROLL
    for (int k = 0; k < 4; ++k) {
      if (feature + k < p.d) store_global(out + k, float_of(parts[k]));
    }
  }
}

template <class T>
FXA_KERNEL(kTileThreads, 2)
smooth_weights_kernel(FXA_PARAMS LateInteractionGradientCuda p) {
  const int row0 = block_index() * kTileRows, column0 = block_index_y() * kTileRows;
  const int x0 = p.first_x + row0, y0 = p.first_y + column0;
  const TileRows<T> left{static_cast<const T*>(p.x.data), p.d, nullptr, x0, minimum(p.x.tokens - x0, kTileRows)};
  const TileRows<T> right{static_cast<const T*>(p.y.data), p.d, nullptr, y0, minimum(p.y.tokens - y0, kTileRows)};
  const float inverse = 1.0f / p.smooth;
  float products[4][4];
  tile_product<T>(left, right, p.d, p.aligned, shared_memory<T>(0), products);
  FXA_UNROLL
  for (int k = 0; k < 4; ++k) {
    FXA_UNROLL
    for (int e = 0; e < 4; ++e) {
      const int row = tile_row(e), column = tile_column(k, e);
      if (row >= left.count || column >= right.count) continue;
      const int n = load_global(p.x.set + x0 + row), m = load_global(p.y.set + y0 + column);
      const auto share = [&](const TokenGradientSide& side, int64_t at) {  // of a pair in one of its tokens' maximum
        const float top = load_global(static_cast<const float*>(side.best) + at);
        return pair_gradient(p, side, n, m) * exponential((products[k][e] - top) * inverse);
      };
      float weight = 0.0f;
      if (within(n, p.x.sets) && within(m, p.y.sets)) {
        if (p.x.best != nullptr) weight += share(p.x, static_cast<int64_t>(x0 + row) * p.y.sets + m);
        if (p.y.best != nullptr) weight += share(p.y, static_cast<int64_t>(n) * p.y.tokens + y0 + column);
      }
      store_global(p.weights + (row0 + row) * p.stride_weights + column0 + column, weight);
    }
  }
}

}  // namespace fastxattn::gpu
