// Bipartite matching (the nearest row of B for each row of A, by cosine) and the weighted merge of rows.
#pragma once

#include "core/cuda/tile.cuh"
#include "pruning/pruning_cuda.h"

namespace fastxattn::gpu {

template <class T>
FXA_KERNEL(kTileThreads, 2)
match_kernel(FXA_PARAMS pruning::MatchCuda p) {
  const pruning::MatchParams& m = p.match;
  const int b = block_index();
  const Segment own(m.cu_a, b, p.rows_a), other(m.cu_b, b, p.rows_b);
  const int a_begin = own.begin, b_begin = other.begin;
  const int a_end = p.rows > 0 ? own.end : a_begin, b_end = p.rows > 0 ? other.end : b_begin;
  const T* x = static_cast<const T*>(m.x);
  const Shared<T> stages = shared_memory<T>(0);
  const Shared<float> values = shared_memory<float>(kTileShared<T>);                  // [2][64]
  const Shared<int> places = shared_memory<int>(kTileShared<T> + 2 * kTileRows * 4);  // [2][64]

  for (int a = a_begin + block_index_y() * kTileRows; a < a_end; a += grid_blocks_y() * kTileRows) {
    const TileRows<T> rows{x, m.channels, m.a_index, a, minimum(a_end - a, kTileRows), p.rows};
    Candidate<false> best[2];
    for (int c = b_begin; c < b_end; c += kTileRows) {
      const TileRows<T> columns{x, m.channels, m.b_index, c, minimum(b_end - c, kTileRows), p.rows};
      float sums[4][4];
      tile_product<T>(rows, columns, m.channels, p.aligned, stages, sums);
      FXA_UNROLL
      for (int n = 0; n < 4; ++n) {
        FXA_UNROLL
        for (int e = 0; e < 4; ++e) {
          const int j = tile_column(n, e);
          if (j >= columns.count) continue;
          const float scale = load_global(p.inverse_norm + clamped(load_global(m.b_index + c + j), p.rows));
          // Infinity times zero is NaN, as is anything of a row that is not finite.
          best[e / 2].consider(sums[n][e] * scale, c - b_begin + j);
        }
      }
    }
    for (int h = 0; h < 2; ++h) {
      best[h].reduce_row();
      if (lane_index() % 4 == 0) {
        const int at = warp_index() / 4 * kTileRows + tile_row(h * 2);
        values.store(at, best[h].value);
        places.store(at, best[h].place);
      }
    }
    sync_threads();
    const int r = thread_index();
    if (r < rows.count) {
      Candidate<false> chosen{values.load(r), places.load(r)};
      chosen.consider(values.load(kTileRows + r), places.load(kTileRows + r));
      const float scale = load_global(p.inverse_norm + clamped(load_global(m.a_index + a + r), p.rows));
      const bool known = chosen.place >= 0 && scale == scale;
      store_global(m.similarity + a + r, known ? chosen.value * scale : NAN);
      store_global(m.best + a + r,
                   b_begin == b_end ? -1 : load_global(m.b_index + b_begin + (known ? chosen.place : 0)));
    }
    sync_threads();
  }
}

template <class T>
FXA_KERNEL(pruning::kMergeThreads, 4)
merge_kernel(FXA_PARAMS pruning::MergeCuda p) {
  const int64_t a = block_index();
  const int64_t begin = maximum(load_global(p.first + a), int64_t{0});
  const int64_t end = minimum(load_global(p.first + a + 1), p.total);
  for (int part = 0; part < 4; ++part) {
    const int64_t c =
        static_cast<int64_t>(block_index_y()) * pruning::kMergeColumns + part * pruning::kMergeThreads + thread_index();
    if (c >= p.channels) break;
    float sum = 0.0f;
    for (int64_t j = begin; j < end; ++j) {
      const int64_t i = minimum(maximum(load_global(p.members + j), int64_t{0}), p.total - 1);
      const float weight = p.coefficient != nullptr ? load_global(p.coefficient + i) : 1.0f;
      sum = fused(to_float(load_global(static_cast<const T*>(p.x) + i * p.channels + c)), weight, sum);
    }
    store_global(static_cast<T*>(p.out) + a * p.channels + c, from_float<T>(sum));
  }
}

}  // namespace fastxattn::gpu
