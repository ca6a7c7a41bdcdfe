// Best matches between every token of one set and a set of the other side, both directions from one pass: the maximum
// with its place, or a smooth maximum.
#pragma once

#include "core/cuda/math.cuh"
#include "core/cuda/tile.cuh"
#include "late_interaction/late_interaction_cuda.h"

namespace fastxattn::gpu {

// What is known of a token's matches, in two parts that merge in any order; what its score is, and what is kept of it.
struct HardMatch {
  using Extra = int;  // the place
  Candidate<true> best;

  FXA_DEVICE explicit HardMatch(const LateInteractionCuda&) {}
  FXA_DEVICE void meet(float similarity, int place) { best.consider(similarity, place); }
  FXA_DEVICE void merge(float value, Extra place) { best.consider(value, place); }
  FXA_DEVICE float value() const { return best.value; }
  FXA_DEVICE Extra extra() const { return best.place; }
  FXA_DEVICE float score() const { return best.place >= 0 ? best.value : 0.0f; }
  FXA_DEVICE int kept() const { return best.place; }
};

struct SmoothMatch {
  using Extra = float;  // the sum of exponentials around the maximum
  LogSum sum;
  float smooth, inverse;

  FXA_DEVICE explicit SmoothMatch(const LateInteractionCuda& p) : smooth(p.smooth), inverse(1.0f / p.smooth) {}
  FXA_DEVICE void meet(float similarity, int) { merge(similarity, 1.0f); }
  FXA_DEVICE void merge(float top, Extra exps) { sum.add(top, exps, inverse); }
  FXA_DEVICE float value() const { return sum.top; }
  FXA_DEVICE Extra extra() const { return sum.exps; }
  FXA_DEVICE float score() const { return sum.exps == 0.0f ? 0.0f : kept(); }
  FXA_DEVICE float kept() const {
    return sum.exps == 0.0f ? -INFINITY : fused(smooth, accurate_log(sum.exps), sum.top);
  }
};

// One pair of sets: tokens [r0, r1) of `rows` against [c0, c1) of `columns`. With `columns_too` the columns' best
// matches come from the same products; `row_is_a` says which side the rows are.
template <class T, class Match>
FXA_DEVICE void best_matches(const LateInteractionCuda& p, bool row_is_a, int n, int m, bool columns_too) {
  using Extra = typename Match::Extra;
  const TokenSide& rows = row_is_a ? p.a : p.b;
  const TokenSide& columns = row_is_a ? p.b : p.a;
  const int row_set = row_is_a ? n : m, column_set = row_is_a ? m : n;
  const Segment own(rows.cu, row_set, rows.tokens), others(columns.cu, column_set, columns.tokens);
  const int r0 = own.begin, r1 = own.end, c0 = others.begin, c1 = others.end;
  const int t = thread_index(), lane = lane_index(), warp = warp_index();
  const Shared<T> stages = shared_memory<T>(0);
  const Shared<float> values = shared_memory<float>(kTileShared<T>);                      // [2][64] of a tile's rows
  const Shared<Extra> extras = shared_memory<Extra>(kTileShared<T> + 2 * kTileRows * 4);  // [2][64]
  const Shared<float> column_values = shared_memory<float>(kTileShared<T> + 4 * kTileRows * 4);
  const Shared<Extra> column_extras = shared_memory<Extra>(kTileShared<T> + 4 * kTileRows * 4 + kMaxSimColumns * 4);

  const auto keep = [](const TokenSide& side, const Match& match, int token, int others, int other) {
    using Kept = decltype(match.kept());
    if (side.best == nullptr) return;
    store_global(static_cast<Kept*>(side.best) + static_cast<int64_t>(token) * others + other, match.kept());
  };
  float sum = 0.0f;  // of the rows that this thread finishes
  for (int r = r0; r < r1; r += kTileRows) {
    const TileRows<T> left{static_cast<const T*>(rows.data), p.d, nullptr, r, minimum(r1 - r, kTileRows)};
    Match best[2] = {Match(p), Match(p)};
    for (int c = c0; c < c1; c += kTileRows) {
      const TileRows<T> right{static_cast<const T*>(columns.data), p.d, nullptr, c, minimum(c1 - c, kTileRows)};
      float sums[4][4];
      tile_product<T>(left, right, p.d, p.aligned, stages, sums);
      FXA_UNROLL
      for (int i = 0; i < 4; ++i) {
        FXA_UNROLL
        for (int e = 0; e < 4; ++e) {
          const int j = tile_column(i, e);
          if (j < right.count) best[e / 2].meet(sums[i][e], c - c0 + j);
        }
      }
      if (!columns_too) continue;
      // Down the columns: within a thread, across the 8 lanes of a column, across the 4 warps.
      FXA_UNROLL
      for (int i = 0; i < 4; ++i) {
        FXA_UNROLL
        for (int e = 0; e < 2; ++e) {
          Match match(p);
          FXA_UNROLL
          for (int h = 0; h < 2; ++h) {
            if (tile_row(h * 2) < left.count) match.meet(sums[i][h * 2 + e], r - r0 + tile_row(h * 2));
          }
          for (int d = 4; d < 32; d *= 2) {
            match.merge(shuffle_xor(match.value(), d), shuffle_xor(match.extra(), d));
          }
          if (lane < 4) {
            const int at = warp % 4 * kTileRows + tile_column(i, e);
            stages.template as<float>().store(at, match.value());
            stages.template as<Extra>().store(4 * kTileRows + at, match.extra());
          }
        }
      }
      sync_threads();
      if (t < right.count) {
        const int at = c - c0 + t;
        Match match(p);
        if (r > r0) match.merge(column_values.load(at), column_extras.load(at));
        for (int w = 0; w < 4; ++w) {
          match.merge(stages.template as<float>().load(w * kTileRows + t),
                      stages.template as<Extra>().load((4 + w) * kTileRows + t));
        }
        column_values.store(at, match.value());
        column_extras.store(at, match.extra());
      }
      sync_threads();
    }
    for (int h = 0; h < 2; ++h) {
      for (int d = 1; d < 4; d *= 2) {
        best[h].merge(shuffle_xor(best[h].value(), d), shuffle_xor(best[h].extra(), d));
      }
      if (lane % 4 == 0) {
        values.store(warp / 4 * kTileRows + tile_row(h * 2), best[h].value());
        extras.store(warp / 4 * kTileRows + tile_row(h * 2), best[h].extra());
      }
    }
    sync_threads();
    if (t < left.count) {
      Match match(p);
      match.merge(values.load(t), extras.load(t));
      match.merge(values.load(kTileRows + t), extras.load(kTileRows + t));
      sum += match.score();
      keep(rows, match, r + t, columns.sets, column_set);
    }
    sync_threads();
  }

  // Sums in one fixed order: each thread's, then the threads' as a tree.
  const auto finish = [&](float part, float* to) {
    for (int d = 16; d > 0; d /= 2) part += shuffle_xor(part, d);
    if (lane == 0) values.store(warp, part);
    sync_threads();
    if (t == 0) {
      double all = 0.0;
      for (int w = 0; w < kTileThreads / 32; ++w) all += values.load(w);
      store_global(to + static_cast<int64_t>(n) * p.b.sets + m, static_cast<float>(all));
    }
    sync_threads();
  };
  if (rows.best_sum != nullptr) finish(sum, rows.best_sum);
  if (columns_too) {
    float other = 0.0f;
    for (int c = c0 + t; c < c1; c += kTileThreads) {
      Match match(p);
      if (r1 > r0) match.merge(column_values.load(c - c0), column_extras.load(c - c0));
      other += match.score();
      keep(columns, match, c, rows.sets, row_set);
    }
    finish(other, columns.best_sum);
  }
}

template <class T, class Match>
FXA_DEVICE void match_sets(const LateInteractionCuda& p) {
  const int n = block_index() / p.b.sets, m = block_index() % p.b.sets;
  const bool from_a = p.a.best_sum != nullptr, from_b = p.b.best_sum != nullptr;
  const bool one_pass = from_a && from_b && Segment(p.b.cu, m, p.b.tokens).count() <= kMaxSimColumns;
  if (from_a) best_matches<T, Match>(p, true, n, m, one_pass);
  if (from_b && !one_pass) best_matches<T, Match>(p, false, n, m, false);
}

template <class T>
FXA_KERNEL(kTileThreads, 2)
maxsim_kernel(FXA_PARAMS LateInteractionCuda p) {
  match_sets<T, HardMatch>(p);
}

template <class T>
FXA_KERNEL(kTileThreads, 2)
smooth_maxsim_kernel(FXA_PARAMS LateInteractionCuda p) {
  match_sets<T, SmoothMatch>(p);
}

}  // namespace fastxattn::gpu
