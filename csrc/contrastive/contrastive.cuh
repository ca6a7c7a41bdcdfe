// Contrastive losses: log-sum-exp statistics over a similarity matrix that is never stored, and the slopes of its
// logits, tile by tile, of InfoNCE and of the sigmoid loss.
//
// Negatives are summed around a running maximum; positives have statistics of their own, so that a converged batch,
// whose negatives weigh 1e-8 beside its positive, loses nothing.
#pragma once

#include "contrastive/contrastive_cuda.h"
#include "core/cuda/math.cuh"
#include "core/cuda/tile.cuh"

namespace fastxattn::gpu {

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

// Each row's logit with one row of y: the diagonal of a tile whose columns are those rows. The products are summed in
// the order of the statistics, so that ranks see exact ties.
template <class T>
FXA_KERNEL(kTileThreads, 2)
contrastive_positives_kernel(FXA_PARAMS ContrastiveCuda p) {
  const int x0 = block_index() * kTileRows;
  const TileRows<T> left = side_rows<T>(p.x, x0);
  const TileRows<T> right{static_cast<const T*>(p.y.data), p.y.stride, p.target, x0, left.count, p.y.rows};
  const float scale = load_global(p.scale), bias = p.bias != nullptr ? load_global(p.bias) : 0.0f;
  float products[4][4];
  tile_product<T>(left, right, p.d, p.aligned, shared_memory<T>(0), products);
  FXA_UNROLL
  for (int n = 0; n < 4; ++n) {
    FXA_UNROLL
    for (int e = 0; e < 4; ++e) {
      const int row = tile_row(e), i = x0 + row;
      if (row != tile_column(n, e) || row >= left.count) continue;
      const float factor =
          p.x.norm != nullptr
              ? load_global(p.x.norm + i) * load_global(p.y.norm + clamped(load_global(p.target + i), p.y.rows))
              : 1.0f;
      store_global(p.logits + i, fused(products[n][e] * factor, scale, bias));
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

// A term is what one pair adds: the slope of its logit z (returned), and kSums sums over its row.
struct InfoNceTerm {
  static constexpr int kSums = 1;  // slope * logit / scale

  static FXA_DEVICE float add(const ContrastiveCuda& p, const Pair& pair, int i, int j, float cosine, float z,
                              float (&sums)[kSums]) {
    float slope = 0.0f;
    if (pair.positive) {
      const float exact = positive_logit(p, i, j, z);
      if (p.x.slopes != nullptr) slope += positive_slope(p.x, i, exact);
      if (p.y.slopes != nullptr) slope += positive_slope(p.y, j, exact);
    } else {
      if (p.x.slopes != nullptr) slope += negative_slope(p.x, i, z);
      if (p.y.slopes != nullptr) slope += negative_slope(p.y, j, z);
    }
    sums[0] = fused(slope, cosine, sums[0]);
    return slope;
  }
};

// A question answered wrongly by a margin costs log(1 + exp(margin)); a positive's margin is its negated logit.
struct SigmoidTerm {
  static constexpr int kSums = 3;  // loss, slope * logit / scale, slope

  static FXA_DEVICE float add(const ContrastiveCuda& p, const Pair& pair, int i, int j, float cosine, float z,
                              float (&sums)[kSums]) {
    const float margin = pair.positive ? -positive_logit(p, i, j, z) : z;
    const float e = exponential(margin > 0.0f ? -margin : margin);  // NaN stays NaN
    sums[0] += (margin > 0.0f ? margin : 0.0f) + log1p_unit(e);
    float slope = ratio(margin > 0.0f ? 1.0f : e, 1.0f + e);
    if (pair.positive) slope = -slope;
    if (p.weight != nullptr) slope *= load_global(p.weight + i);
    sums[1] = fused(slope, cosine, sums[1]);
    sums[2] += slope;
    return slope;
  }
};

// A tile of a window: slopes of its products, and the term's sums over its rows.
template <class T, class Term>
FXA_DEVICE void tile_of_slopes(const ContrastiveCuda& p) {
  const Shared<T> stages = shared_memory<T>(0);
  const int row0 = block_index() * kTileRows, column0 = block_index_y() * kTileRows;
  const int x0 = p.first_x + row0, y0 = p.first_y + column0;
  const float scale = load_global(p.scale), bias = p.bias != nullptr ? load_global(p.bias) : 0.0f;
  float products[4][4], sums[2][Term::kSums] = {};
  tile_product<T>(side_rows<T>(p.x, x0), side_rows<T>(p.y, y0), p.d, p.aligned, stages, products);
  FXA_UNROLL
  for (int n = 0; n < 4; ++n) {
    FXA_UNROLL
    for (int e = 0; e < 4; ++e) {
      const int i = x0 + tile_row(e), j = y0 + tile_column(n, e);
      if (i >= p.x.rows || j >= p.y.rows) continue;
      const Pair pair(p, i, j);
      const float cosine = products[n][e] * pair.factor;
      // A slope of zero times an infinite logit is nothing, not NaN, where the pair takes no part.
      const bool live = pair.positive || pair.negative;
      const float slope = live ? Term::add(p, pair, i, j, cosine, fused(cosine, scale, bias), sums[e / 2]) : 0.0f;
      if (p.dz != nullptr) {
        store_global(p.dz + (row0 + tile_row(e)) * p.stride_dz + column0 + tile_column(n, e),
                     slope * (pair.factor * scale));
      }
    }
  }
  const Shared<float> other = shared_memory<float>(0);
  FXA_UNROLL
  for (int h = 0; h < 2; ++h) {
    FXA_UNROLL
    for (int s = 0; s < Term::kSums; ++s) {
      for (int d = 1; d < 4; d *= 2) sums[h][s] += shuffle_xor(sums[h][s], d);
      if (lane_index() % 4 == 0 && warp_index() >= 4) other.store(s * kTileRows + tile_row(h * 2), sums[h][s]);
    }
  }
  sync_threads();
  FXA_UNROLL
  for (int h = 0; h < 2; ++h) {
    const int at = tile_row(h * 2);
    if (lane_index() % 4 != 0 || warp_index() >= 4 || x0 + at >= p.x.rows) continue;
    FXA_UNROLL
    for (int s = 0; s < Term::kSums; ++s) {
      const int64_t part = static_cast<int64_t>(s) * grid_blocks_y() + block_index_y();
      store_global(p.sums + part * p.stride_sums + row0 + at, sums[h][s] + other.load(s * kTileRows + at));
    }
  }
}

template <class T>
FXA_KERNEL(kTileThreads, 2)
contrastive_slopes_kernel(FXA_PARAMS ContrastiveCuda p) {
  tile_of_slopes<T, InfoNceTerm>(p);
}

template <class T>
FXA_KERNEL(kTileThreads, 2)
sigmoid_kernel(FXA_PARAMS ContrastiveCuda p) {
  tile_of_slopes<T, SigmoidTerm>(p);
}

}  // namespace fastxattn::gpu
