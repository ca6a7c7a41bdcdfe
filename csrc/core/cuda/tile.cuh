// Products of 64 rows of one matrix with 64 rows of another, by 256 threads: tensor cores for 16-bit elements, exact
// float32 multiply-adds for float32. Both leave the sums in the same places, so that an epilogue is written once.
//
// Thread (warp w, lane l) holds sums[n][e] of row tile_row(e) and column tile_column(n, e): two rows, sixteen columns.
#pragma once

#include <cmath>

#include "core/cuda/device.h"

namespace fastxattn::gpu {

inline constexpr int kTileRows = 64, kTileThreads = 256;
// Columns of a stage: 128 bytes of each row, so that eight lanes copy one row. Rows lie 16 bytes further apart: the
// eight rows of a fragment use all banks.
template <class T>
inline constexpr int kTileDepth = 128 / static_cast<int>(sizeof(T));
template <class T>
inline constexpr int kTilePitch = 144 / static_cast<int>(sizeof(T));
template <class T>
inline constexpr int kTileShared = 2 * 2 * kTileRows * kTilePitch<T> * static_cast<int>(sizeof(T));

FXA_DEVICE int tile_row(int e) { return warp_index() % 4 * 16 + lane_index() / 4 + e / 2 * 8; }
FXA_DEVICE int tile_column(int n, int e) { return warp_index() / 4 * 32 + n * 8 + lane_index() % 4 * 2 + e % 2; }

// A number that memory holds, as an index of something with `size` elements, one at least.
FXA_DEVICE int clamped(int i, int size) { return minimum(maximum(i, 0), size - 1); }

// What offsets say of one sequence or set, clamped to the rows that there are.
struct Segment {
  int begin, end;
  FXA_DEVICE Segment(const int32_t* offsets, int i, int rows)
      : begin(minimum(maximum(load_global(offsets + i), 0), rows)),
        end(minimum(maximum(load_global(offsets + i + 1), begin), rows)) {}
  FXA_DEVICE int count() const { return end - begin; }
};

// `count` rows from `first` on: of a matrix, or through an index.
template <class T>
struct TileRows {
  const T* data;
  int64_t stride;        // elements from one row to the next
  const int32_t* index;  // null: the rows themselves
  int64_t first;
  int count;     // rows beyond it are zero
  int rows = 0;  // of the matrix, which an index is clamped to

  FXA_DEVICE const T* row(int r) const {
    return data + (index != nullptr ? int64_t{clamped(load_global(index + first + r), rows)} : first + r) * stride;
  }
};

// Columns [depth_begin, depth_begin + kTileDepth) of 64 rows into shared memory, zero outside.
template <class T>
FXA_DEVICE void stage_rows(const TileRows<T>& rows, int64_t depth, int64_t depth_begin, bool aligned, Shared<T> to) {
  constexpr int kPiece = 16 / static_cast<int>(sizeof(T)), kPieces = kTileDepth<T> / kPiece;
  for (int i = thread_index(); i < kTileRows * kPieces; i += kTileThreads) {
    const int r = i / kPieces, c = i % kPieces * kPiece;
    const int64_t left = r < rows.count ? depth - depth_begin - c : 0;
    const int valid = left <= 0 ? 0 : left < kPiece ? static_cast<int>(left) : kPiece;
    const T* from = valid > 0 ? rows.row(r) + depth_begin + c : rows.data;
    const Shared<T> place = to.at(r * kTilePitch<T> + c);
    if (aligned) {
      cp_async<16>(place, from, valid * static_cast<int>(sizeof(T)));
    } else {
      for (int k = 0; k < kPiece; ++k) place.store(k, k < valid ? load_global(from + k) : from_float<T>(0.0f));
    }
  }
}

template <class T>
FXA_DEVICE void multiply_stage(Shared<T> a, Shared<T> b, float (&sums)[4][4]) {
  const int lane = lane_index(), row0 = warp_index() % 4 * 16, column0 = warp_index() / 4 * 32;
  if constexpr (sizeof(T) == 2) {
    FXA_UNROLL
    for (int k = 0; k < kTileDepth<T>; k += 16) {
      uint32_t left[4], right[4];
      ldmatrix_x4(left, a.at((row0 + lane % 16) * kTilePitch<T> + k + lane / 16 * 8));
      FXA_UNROLL
      for (int n = 0; n < 4; n += 2) {
        // Two groups of 8 columns: matrices (n, k), (n, k + 8), (n + 1, k), (n + 1, k + 8).
        ldmatrix_x4(right, b.at((column0 + n * 8 + lane / 16 * 8 + lane % 8) * kTilePitch<T> + k + lane / 8 % 2 * 8));
        mma_m16n8k16<T>(sums[n], left, {right[0], right[1]});
        mma_m16n8k16<T>(sums[n + 1], left, {right[2], right[3]});
      }
    }
  } else {
    FXA_UNROLL
    for (int k = 0; k < kTileDepth<T>; k += 4) {
      const U4 low = a.template load_as<U4>((row0 + lane / 4) * kTilePitch<T> + k);
      const U4 high = a.template load_as<U4>((row0 + lane / 4 + 8) * kTilePitch<T> + k);
      FXA_UNROLL
      for (int n = 0; n < 4; ++n) {
        FXA_UNROLL
        for (int e = 0; e < 2; ++e) {
          const U4 right = b.template load_as<U4>((column0 + n * 8 + lane % 4 * 2 + e) * kTilePitch<T> + k);
          FXA_UNROLL
          for (int h = 0; h < 2; ++h) {
            const U4& left = h == 0 ? low : high;
            float& sum = sums[n][h * 2 + e];
            sum = fused(float_of(left.x), float_of(right.x), sum);
            sum = fused(float_of(left.y), float_of(right.y), sum);
            sum = fused(float_of(left.z), float_of(right.z), sum);
            sum = fused(float_of(left.w), float_of(right.w), sum);
          }
        }
      }
    }
  }
}

// sums = a b^T. Shared memory of kTileShared<T> bytes at `stages`; free again when the call returns in all threads
// that have met at a barrier since.
template <class T>
FXA_DEVICE void tile_product(const TileRows<T>& a, const TileRows<T>& b, int64_t depth, bool aligned, Shared<T> stages,
                             float (&sums)[4][4]) {
  constexpr int kSide = kTileRows * kTilePitch<T>;
  FXA_UNROLL
  for (int n = 0; n < 4; ++n) {
    FXA_UNROLL
    for (int e = 0; e < 4; ++e) sums[n][e] = 0.0f;
  }
  const auto fetch = [&](int64_t k, int buffer) {
    if (k < depth) {
      stage_rows(a, depth, k, aligned, stages.at(buffer * 2 * kSide));
      stage_rows(b, depth, k, aligned, stages.at(buffer * 2 * kSide + kSide));
    }
    cp_async_commit();
  };
  fetch(0, 0);
  int buffer = 0;
  for (int64_t k = 0; k < depth; k += kTileDepth<T>, buffer ^= 1) {
    fetch(k + kTileDepth<T>, buffer ^ 1);
    cp_async_wait<1>();
    sync_threads();
    multiply_stage<T>(stages.at(buffer * 2 * kSide), stages.at(buffer * 2 * kSide + kSide), sums);
    sync_threads();
  }
}

// The best match so far: the larger value, the earlier of equals. NaN never is one, or (NanWins) beats all numbers.
template <bool NanWins>
struct Candidate {
  float value = -INFINITY;
  int place = -1;  // none

  FXA_DEVICE void consider(float other, int at) {
    const bool nan = NanWins && other != other, held = NanWins && value != value;
    const bool better = place < 0 ? other == other || nan : (other > value && !held) || (nan && !held);
    const bool earlier = at < place && (other == value || (nan && held));
    if (at >= 0 && (better || earlier)) value = other, place = at;
  }
  // Afterwards all 4 lanes that share a row hold its best.
  FXA_DEVICE void reduce_row() {
    for (int d = 1; d < 4; d *= 2) consider(shuffle_xor(value, d), shuffle_xor(place, d));
  }
};

}  // namespace fastxattn::gpu
