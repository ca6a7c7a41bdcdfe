// Contrastive losses: log-sum-exp statistics over a similarity matrix that is never stored, and the slopes of its
// logits, tile by tile.
//
// Negatives are summed around a running maximum; positives have statistics of their own, so that a converged batch,
// whose negatives weigh 1e-8 beside its positive, loses nothing.
#pragma once

#include "contrastive/contrastive_cuda.h"
#include "core/cuda_tile.cuh"

namespace fastxattn::gpu {

// exp(x) for x <= 0 (or NaN) within a few units of the last place: exp2 of the rounded product, times what it lost.
FXA_DEVICE float exponential(float x) {
  if (x < -104.0f) return 0.0f;
  const float t = x * 1.44269502f;
  const float lost = fused(x, 1.44269502f, -t) + x * 1.92596299e-8f;
  return fast_exp2(t) * fused(lost, 0.693147182f, 1.0f);
}

// Running maximum and sum of exponentials around it.
struct LogSum {
  float top = -INFINITY, exps = 0.0f;

  FXA_DEVICE void add(float other_top, float other_exps) {
    const float now = maximum(top, other_top), around = now == -INFINITY ? 0.0f : now;
    exps = exps * exponential(top - around) + other_exps * exponential(other_top - around);
    top = now;
  }
};

struct ContrastiveRow {
  LogSum negative, positive;
  float sum = 0.0f, count = 0.0f, ahead = 0.0f, sum_pos = 0.0f, count_pos = 0.0f;

  FXA_DEVICE float get(int plane) const {
    const float planes[kContrastiveStatePlanes] = {negative.top, negative.exps, sum,     count,    ahead,
                                                   positive.top, positive.exps, sum_pos, count_pos};
    return planes[plane];
  }
  FXA_DEVICE void add(const float (&other)[kContrastiveStatePlanes]) {
    negative.add(other[kStateTop], other[kStateExp]);
    positive.add(other[kStateTopPos], other[kStateExpPos]);
    sum += other[kStateSum], count += other[kStateCount], ahead += other[kStateAhead];
    sum_pos += other[kStateSumPos], count_pos += other[kStateCountPos];
  }
};

// A pair of the matrix.
struct Pair {
  bool positive, negative;
  float factor;  // norm_x * norm_y

  FXA_DEVICE Pair(const ContrastiveCuda& p, int i, int j) {
    const bool live = i < p.x.rows && j < p.y.rows && !(p.exclude_self && i == j);
    positive = live && load_global(p.x.id + i) == load_global(p.y.id + j);
    negative = live && !positive;
    if (negative && p.x.skip != nullptr) negative = load_global(p.x.skip + i) != load_global(p.y.skip + j);
    factor = live && p.x.norm != nullptr ? load_global(p.x.norm + i) * load_global(p.y.norm + j) : 1.0f;
  }
};

FXA_DEVICE float positive_logit(const ContrastiveCuda& p, int i, int j, float z) {
  return p.exact == nullptr ? z : load_global(p.exact + (p.exact_by_row ? i : j));
}

template <class T>
FXA_DEVICE TileRows<T> side_rows(const ContrastiveCudaSide& side, int first) {
  return {static_cast<const T*>(side.data), side.stride, nullptr, first, minimum(side.rows - first, kTileRows)};
}

template <class T>
FXA_KERNEL(kTileThreads, 2)
contrastive_stats_kernel(FXA_PARAMS ContrastiveCuda p) {
  const Shared<T> stages = shared_memory<T>(0);
  const int x0 = block_index() * kTileRows, split = block_index_y();
  const float scale = load_global(p.scale), bias = p.bias != nullptr ? load_global(p.bias) : 0.0f;
  const int tiles = (p.y.rows + kTileRows - 1) / kTileRows, share = (tiles + p.splits - 1) / p.splits;
  ContrastiveRow rows[2];

  for (int tile = split * share; tile < minimum((split + 1) * share, tiles); ++tile) {
    const int y0 = tile * kTileRows;
    float z[4][4];
    tile_product<T>(side_rows<T>(p.x, x0), side_rows<T>(p.y, y0), p.d, p.aligned, stages, z);
    FXA_UNROLL
    for (int h = 0; h < 2; ++h) {
      ContrastiveRow& row = rows[h];
      const int i = x0 + tile_row(h * 2);
      const float limit = p.x.limit != nullptr && i < p.x.rows ? load_global(p.x.limit + i) : INFINITY;
      const float rank = p.rank != nullptr && i < p.x.rows ? load_global(p.rank + i) : INFINITY;
      float top = -INFINITY;
      uint32_t negatives = 0;
      FXA_UNROLL
      for (int n = 0; n < 4; ++n) {
        FXA_UNROLL
        for (int e = 0; e < 2; ++e) {
          const int j = y0 + tile_column(n, e);
          const Pair pair(p, i, j);
          float& x = z[n][h * 2 + e];
          x = fused(x * pair.factor, scale, bias);
          if (pair.positive) {
            const float exact = positive_logit(p, i, j, x);
            row.positive.add(exact, 1.0f);
            row.sum_pos += exact;
            row.count_pos += 1.0f;
          }
          if (!pair.negative || x > limit) continue;
          negatives |= 1u << (n * 2 + e);
          top = maximum(top, x);
          if (!p.means) continue;
          row.sum += x;
          row.count += 1.0f;
          row.ahead += p.rank != nullptr && x >= rank ? 1.0f : 0.0f;
        }
      }
      row.negative.add(top, 0.0f);
      const float around = row.negative.top == -INFINITY ? 0.0f : row.negative.top;
      FXA_UNROLL
      for (int n = 0; n < 4; ++n) {
        FXA_UNROLL
        for (int e = 0; e < 2; ++e) {
          if (negatives >> (n * 2 + e) & 1u) row.negative.exps += exponential(z[n][h * 2 + e] - around);
        }
      }
    }
  }

  // A row's statistics lie in 4 lanes of two warps.
  const Shared<float> other = shared_memory<float>(0);
  for (int h = 0; h < 2; ++h) {
    float planes[kContrastiveStatePlanes];
    for (int d = 1; d < 4; d *= 2) {
      for (int s = 0; s < kContrastiveStatePlanes; ++s) planes[s] = shuffle_xor(rows[h].get(s), d);
      rows[h].add(planes);
    }
    const int at = tile_row(h * 2);
    const bool first = lane_index() % 4 == 0;
    sync_threads();
    for (int s = 0; s < kContrastiveStatePlanes; ++s) {
      if (first && warp_index() >= 4) other.store(s * kTileRows + at, rows[h].get(s));
    }
    sync_threads();
    if (!first || warp_index() >= 4 || x0 + at >= p.x.rows) continue;
    for (int s = 0; s < kContrastiveStatePlanes; ++s) planes[s] = other.load(s * kTileRows + at);
    rows[h].add(planes);
    for (int s = 0; s < kContrastiveStatePlanes; ++s) {
      const int64_t plane = static_cast<int64_t>(split) * kContrastiveStatePlanes + s;
      store_global(p.state + plane * p.x.rows + x0 + at, rows[h].get(s));
    }
  }
}

// What one direction's statistics add to the slope of a negative, and of a positive, of its row r.
FXA_DEVICE float negative_slope(const ContrastiveCudaSide& side, int r, float z) {
  const auto plane = [&](int s) { return load_global(side.slopes + static_cast<int64_t>(s) * side.rows + r); };
  if (side.limit != nullptr && z > load_global(side.limit + r)) return 0.0f;
  return fused(plane(kSlopeGrad), exponential(z - plane(kSlopeLse)), plane(kSlopeMean));
}
FXA_DEVICE float positive_slope(const ContrastiveCudaSide& side, int r, float z) {
  const auto plane = [&](int s) { return load_global(side.slopes + static_cast<int64_t>(s) * side.rows + r); };
  const float share = plane(kSlopeSharePos);  // with one positive the excess counts for exactly nothing
  return fused(plane(kSlopeExcessPos), exponential(z - plane(kSlopeLsePos)) - share, plane(kSlopeMeanPos) * share);
}

template <class T>
FXA_KERNEL(kTileThreads, 2)
contrastive_slopes_kernel(FXA_PARAMS ContrastiveCuda p) {
  const Shared<T> stages = shared_memory<T>(0);
  const int row0 = block_index() * kTileRows, column0 = block_index_y() * kTileRows;
  const int x0 = p.first_x + row0, y0 = p.first_y + column0;
  const float scale = load_global(p.scale), bias = p.bias != nullptr ? load_global(p.bias) : 0.0f;
  float products[4][4], dots[2] = {0.0f, 0.0f};
  tile_product<T>(side_rows<T>(p.x, x0), side_rows<T>(p.y, y0), p.d, p.aligned, stages, products);
  FXA_UNROLL
  for (int n = 0; n < 4; ++n) {
    FXA_UNROLL
    for (int e = 0; e < 4; ++e) {
      const int i = x0 + tile_row(e), j = y0 + tile_column(n, e);
      if (i >= p.x.rows || j >= p.y.rows) continue;
      const Pair pair(p, i, j);
      const float cosine = products[n][e] * pair.factor, z = fused(cosine, scale, bias);
      float slope = 0.0f;
      if (pair.positive) {
        const float exact = positive_logit(p, i, j, z);
        if (p.x.slopes != nullptr) slope += positive_slope(p.x, i, exact);
        if (p.y.slopes != nullptr) slope += positive_slope(p.y, j, exact);
      } else if (pair.negative) {
        if (p.x.slopes != nullptr) slope += negative_slope(p.x, i, z);
        if (p.y.slopes != nullptr) slope += negative_slope(p.y, j, z);
      }
      // A slope of zero times an infinite logit is nothing, not NaN, where the pair takes no part.
      if (pair.positive || pair.negative) dots[e / 2] = fused(slope, cosine, dots[e / 2]);
      if (p.dz != nullptr) {
        store_global(p.dz + (row0 + tile_row(e)) * p.stride_dz + column0 + tile_column(n, e),
                     slope * (pair.factor * scale));
      }
    }
  }
  const Shared<float> other = shared_memory<float>(0);
  for (int h = 0; h < 2; ++h) {
    for (int d = 1; d < 4; d *= 2) dots[h] += shuffle_xor(dots[h], d);
    if (lane_index() % 4 == 0 && warp_index() >= 4) other.store(tile_row(h * 2), dots[h]);
  }
  sync_threads();
  for (int h = 0; h < 2; ++h) {
    const int at = tile_row(h * 2);
    if (lane_index() % 4 == 0 && warp_index() < 4 && x0 + at < p.x.rows) {
      store_global(p.dot + block_index_y() * p.stride_dot + row0 + at, dots[h] + other.load(at));
    }
  }
}

}  // namespace fastxattn::gpu
