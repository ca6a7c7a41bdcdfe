// Products of tiles on the tensor cores: 16 rows per warp, operands in swizzled shared memory or in accumulators.
//
// float16 and bfloat16 use m16n8k16. float32 uses three TF32 products of operands split in two (Ootomo and Yokota,
// 2022) and adds each result to the accumulator with an ordinary addition, which rounds where the tensor cores would
// cut off; an infinite operand gives NaN there.
#pragma once

#include "core/cuda/device.h"

namespace fastxattn {

using gpu::Shared;
using gpu::U4;

// Elements in 16 bytes, the piece in which tiles are copied and read.
template <class T>
inline constexpr int kPiece = 16 / static_cast<int>(sizeof(T));

// Where (row, column) of a tile of D columns lies. Pieces of 16 bytes change places within a row so that the same
// piece of eight neighbouring rows falls on different banks; D is a multiple of 32.
template <class T, int D>
FXA_DEVICE int tile_place(int row, int column) {
  constexpr int pieces = D / kPiece<T>;
  const int mix = pieces % 8 == 0 ? row & 7 : (row >> 1) & 3;
  return row * D + ((column / kPiece<T>)^mix) * kPiece<T> + column % kPiece<T>;
}

// tile_place(Row + row, Column + column) for a lane's own row (below 16) and column (below a step of Column) and
// constants Row, a multiple of 8, and Column: what depends on the lane is computed once, and is little.
template <class T, int D>
struct LanePlace {
  int base, mixed;

  FXA_DEVICE LanePlace(int row, int column)
      : base(row * D + column % kPiece<T>),
        mixed((column / kPiece<T>)^(D / kPiece<T> % 8 == 0 ? row & 7 : (row >> 1) & 3)) {}
  FXA_DEVICE int at(int row, int column) const {
    const int piece = column / kPiece<T>;
    return base + row * D + (piece & ~7) * kPiece<T> + ((piece & 7) ^ mixed) * kPiece<T>;
  }
};

// The 16 x kStep operand A, and how a warp multiplies with it.
template <class T>
struct Operand {
  static constexpr int kStep = 16;  // columns of A, rows of B
  uint32_t v[4];

  // Rows row..row+15 and columns column..column+15 of a tile.
  template <int D>
  FXA_DEVICE void load(Shared<T> tile, int row, int column) {
    const int lane = gpu::lane_index();
    gpu::ldmatrix_x4(v, tile.at(LanePlace<T, D>(lane % 16, lane / 16 * 8).at(row, column)));
  }
  // Columns 16 step..16 step + 15 of accumulators.
  template <int N>
  FXA_DEVICE void round(const float (&c)[N][4], int step) {
    v[0] = gpu::pack<T>(c[2 * step][0], c[2 * step][1]);
    v[1] = gpu::pack<T>(c[2 * step][2], c[2 * step][3]);
    v[2] = gpu::pack<T>(c[2 * step + 1][0], c[2 * step + 1][1]);
    v[3] = gpu::pack<T>(c[2 * step + 1][2], c[2 * step + 1][3]);
  }
  FXA_DEVICE void multiply(float (&d)[4], const uint32_t (&b)[2]) const { gpu::mma_m16n8k16<T>(d, v, b); }

  // B from rows row..row+15 (depth) and columns column..column+7 of a tile.
  template <int D>
  static FXA_DEVICE void load_depth(uint32_t (&b)[2], Shared<T> tile, int row, int column) {
    gpu::ldmatrix_x2_trans(b, tile.at(LanePlace<T, D>(gpu::lane_index() % 16, 0).at(row, column)));
  }
  // The same for 16 columns.
  template <int D>
  static FXA_DEVICE void load_depth_pair(uint32_t (&first)[2], uint32_t (&second)[2], Shared<T> tile, int row,
                                         int column) {
    const int lane = gpu::lane_index();
    uint32_t r[4];
    gpu::ldmatrix_x4_trans(r, tile.at(LanePlace<T, D>(lane % 16, lane / 16 * 8).at(row, column)));
    first[0] = r[0], first[1] = r[1], second[0] = r[2], second[1] = r[3];
  }
  // Clears the rows of b, counted from row 0 of the tile, that `keep` has no bit for.
  static FXA_DEVICE void keep_rows(uint32_t (&b)[2], uint64_t keep, int row) {
    const int pair = gpu::lane_index() % 4 * 2;
    for (int i = 0; i < 2; ++i) {
      const auto bits = static_cast<uint32_t>(keep >> (row + pair + 8 * i));
      b[i] &= (bits & 1u ? 0xffffu : 0u) | (bits & 2u ? 0xffff0000u : 0u);
    }
  }
};

template <>
struct Operand<float> {
  static constexpr int kStep = 8;
  uint32_t big[4], small[4];

  static FXA_DEVICE void split(uint32_t x, uint32_t& big, uint32_t& small) {
    big = gpu::to_tf32(gpu::float_of(x));
    small = gpu::to_tf32(gpu::float_of(x) - gpu::float_of(big));
  }
  template <int D>
  FXA_DEVICE void load(Shared<float> tile, int row, int column) {
    const int lane = gpu::lane_index();
    uint32_t v[4];
    gpu::ldmatrix_x4(v, tile.at(LanePlace<float, D>(lane % 16, lane / 16 * 4).at(row, column)));
    FXA_UNROLL
    for (int i = 0; i < 4; ++i) split(v[i], big[i], small[i]);
  }
  // Accumulators hold columns 2t and 2t + 1 where the operand wants t and t + 4: B's rows are taken in that order too.
  template <int N>
  FXA_DEVICE void round(const float (&c)[N][4], int step) {
    split(gpu::bits_of(c[step][0]), big[0], small[0]);
    split(gpu::bits_of(c[step][2]), big[1], small[1]);
    split(gpu::bits_of(c[step][1]), big[2], small[2]);
    split(gpu::bits_of(c[step][3]), big[3], small[3]);
  }
  FXA_DEVICE void multiply(float (&d)[4], const uint32_t (&b)[2]) const {
    uint32_t b_big[2], b_small[2];
    split(b[0], b_big[0], b_small[0]);
    split(b[1], b_big[1], b_small[1]);
    float sum[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    gpu::mma_m16n8k8_tf32(sum, small, b_big);
    gpu::mma_m16n8k8_tf32(sum, big, b_small);
    gpu::mma_m16n8k8_tf32(sum, big, b_big);
    FXA_UNROLL
    for (int i = 0; i < 4; ++i) d[i] += sum[i];
  }
  template <int D>
  static FXA_DEVICE void load_depth(uint32_t (&b)[2], Shared<float> tile, int row, int column) {
    const int lane = gpu::lane_index();
    FXA_UNROLL
    for (int i = 0; i < 2; ++i) {
      b[i] = gpu::bits_of(tile.load(LanePlace<float, D>(lane % 4 * 2 + i, lane / 4).at(row, column)));
    }
  }
  template <int D>
  static FXA_DEVICE void load_depth_pair(uint32_t (&first)[2], uint32_t (&second)[2], Shared<float> tile, int row,
                                         int column) {
    load_depth<D>(first, tile, row, column);
    load_depth<D>(second, tile, row, column + 8);
  }
  static FXA_DEVICE void keep_rows(uint32_t (&b)[2], uint64_t keep, int row) {
    for (int i = 0; i < 2; ++i) {
      if ((keep >> (row + gpu::lane_index() % 4 * 2 + i) & 1u) == 0) b[i] = 0;
    }
  }
};

// c (16, N) += A (16, D) B^T for rows 0..N-1 of tile B; a(step) gives A's columns kStep step.. as an Operand.
template <class T, int D, int N, class A>
FXA_DEVICE void multiply_rows(float (&c)[N / 8][4], A a, Shared<T> b) {
  const int lane = gpu::lane_index();
  FXA_UNROLL_BY(sizeof(T) == 4 ? 2 : D / 16)
  for (int step = 0; step < D / Operand<T>::kStep; ++step) {
    const Operand<T> operand = a(step);
    FXA_UNROLL
    for (int n = 0; n < N; n += 16) {
      uint32_t r[4];
      const LanePlace<T, D> place(lane % 8 + lane / 16 * 8, lane / 8 % 2 * kPiece<T>);
      gpu::ldmatrix_x4(r, b.at(place.at(n, step * Operand<T>::kStep)));
      const uint32_t first[2] = {r[0], r[1]}, second[2] = {r[2], r[3]};
      operand.multiply(c[n / 8], first);
      operand.multiply(c[n / 8 + 1], second);
    }
  }
}

// c (16, N) += A (16, K) B for columns first..first+N-1 of tile B, K rows of D; A are accumulators, rounded to T.
template <class T, int D, int K, int N>
FXA_DEVICE void multiply_depth(float (&c)[N / 8][4], const float (&a)[K / 8][4], Shared<T> b, int first = 0) {
  FXA_UNROLL
  for (int step = 0; step < K / Operand<T>::kStep; ++step) {
    Operand<T> operand;
    operand.round(a, step);
    FXA_UNROLL
    for (int n = 0; n < N; n += 16) {
      if constexpr (sizeof(T) == 4) gpu::keep_order();
      uint32_t low[2], high[2];
      Operand<T>::template load_depth_pair<D>(low, high, b, step * Operand<T>::kStep, first + n);
      operand.multiply(c[n / 8], low);
      operand.multiply(c[n / 8 + 1], high);
    }
  }
}

// The same where rows `bad` of B hold NaN or infinity, which may only reach the rows of c that see them: A is zero
// elsewhere, and zero times NaN is NaN. sees(half, k): whether this thread's row (of two) sees row k of B.
template <class T, int D, int K, int N, class Sees>
FXA_DEVICE void multiply_depth_guarded(float (&c)[N / 8][4], const float (&a)[K / 8][4], Shared<T> b, uint64_t bad,
                                       Sees sees, int first = 0) {
  FXA_UNROLL
  for (int n = 0; n < N / 8; ++n) {
    uint64_t keep = ~bad, left = bad;
    while (true) {  // the sound rows, then each bad one
      float before[4], after[4];
      FXA_UNROLL
      for (int e = 0; e < 4; ++e) before[e] = after[e] = c[n][e];
      FXA_UNROLL
      for (int step = 0; step < K / Operand<T>::kStep; ++step) {
        Operand<T> operand;
        operand.round(a, step);
        uint32_t column[2];
        Operand<T>::template load_depth<D>(column, b, step * Operand<T>::kStep, first + n * 8);
        Operand<T>::keep_rows(column, keep, step * Operand<T>::kStep);
        operand.multiply(after, column);
      }
      const bool sound = keep == ~bad;
      const int k = sound ? 0 : gpu::find_first_64(keep) - 1;
      FXA_UNROLL
      for (int e = 0; e < 4; ++e) c[n][e] = sound || sees(e / 2, k) ? after[e] : before[e];
      if (left == 0) break;
      keep = left & (~left + 1);
      left &= left - 1;
    }
  }
}

// Whether a word holds NaN or infinity.
template <class T>
FXA_DEVICE bool not_finite(uint32_t word) {
  if constexpr (sizeof(T) == 4) {
    return (word & 0x7f800000u) == 0x7f800000u;
  } else {
    // Adding one to a full exponent carries into the sign.
    constexpr bool half = sizeof(T) == 2 && std::is_same_v<T, f16_t>;
    constexpr uint32_t exponent = half ? 0x7c007c00u : 0x7f807f80u, one = half ? 0x04000400u : 0x00800080u;
    return (((word & exponent) + one) & 0x80008000u) != 0;
  }
}
template <class T>
FXA_DEVICE bool not_finite(U4 v) {
  return not_finite<T>(v.x) || not_finite<T>(v.y) || not_finite<T>(v.z) || not_finite<T>(v.w);
}

// Copies rows 0..Rows-1 to a tile of D columns, zeros from row `rows` and column `width` on; address(row) gives the
// first element of a row. Asynchronous (cp.async, not committed) when rows come in pieces of 16 bytes.
template <class T, int D, int Rows, int Threads, class Address>
FXA_DEVICE void load_tile(Shared<T> tile, int rows, int width, bool aligned, Address address) {
  constexpr int pieces = D / kPiece<T>, all = Rows * pieces;
  if (aligned) {
    FXA_UNROLL
    for (int i = 0; i < (all + Threads - 1) / Threads; ++i) {
      const int piece = i * Threads + gpu::thread_index(), row = piece / pieces, column = piece % pieces * kPiece<T>;
      if (all % Threads != 0 && piece >= all) break;
      const bool there = row < rows && column < width;
      const T* from = address(row < rows ? row : 0) + (there ? column : 0);
      gpu::cp_async<16>(tile.at(tile_place<T, D>(row, column)), from, there ? 16 : 0);
    }
  } else {
    FXA_NO_UNROLL
    for (int i = gpu::thread_index(); i < Rows * D; i += Threads) {
      const int row = i / D, column = i % D;
      T x = gpu::from_float<T>(0.0f);
      if (row < rows && column < width) x = gpu::load_global(address(row) + column);
      tile.store(tile_place<T, D>(row, column), x);
    }
  }
}

// Rows of a matrix in memory: `first`, first + 1, ..., or the rows that an index names, clamped to the `limit` there
// are.
template <class T>
struct RowsOf {
  const T* base;
  int64_t stride;
  const int32_t* index;
  int first, limit;

  FXA_DEVICE const T* operator()(int i) const {
    int row = first + i;
    if (index != nullptr) row = gpu::load_global(index + row);
    row = gpu::minimum(gpu::maximum(row, 0), limit - 1);
    return base + row * stride;
  }
};

// load_tile for such rows, with little arithmetic where they are neighbours.
template <class T, int D, int Rows, int Threads>
FXA_DEVICE void load_rows(Shared<T> tile, int rows, int width, bool aligned, const RowsOf<T>& from) {
  constexpr int pieces = D / kPiece<T>, together = Threads / pieces;  // rows that the block copies at once
  if constexpr (Threads % pieces == 0 && Rows % (together > 0 ? together : 1) == 0) {
    if (aligned && from.index == nullptr) {
      const int row = gpu::thread_index() / pieces, column = gpu::thread_index() % pieces * kPiece<T>;
      const T* source = from.base + (from.first + row) * from.stride + column;
      const int left = column < width ? rows - row : 0;
      FXA_UNROLL
      for (int i = 0; i < Rows; i += together) {
        gpu::cp_async<16>(tile.at(tile_place<T, D>(row + i, column)), source, i < left ? 16 : 0);
        source += together * from.stride;
      }
      return;
    }
  }
  load_tile<T, D, Rows, Threads>(tile, rows, width, aligned, from);
}

// Whether what this thread copied with load_tile holds NaN or infinity; before the barrier that shows it to others.
template <class T, int D, int Rows, int Threads>
FXA_DEVICE bool loaded_bad(Shared<T> tile, bool aligned) {
  bool bad = false;
  if (aligned) {
    constexpr int pieces = D / kPiece<T>, all = Rows * pieces;
    FXA_UNROLL
    for (int i = 0; i < (all + Threads - 1) / Threads; ++i) {
      const int piece = i * Threads + gpu::thread_index();
      if (all % Threads != 0 && piece >= all) break;
      bad |= not_finite<T>(tile.template load_as<U4>(tile_place<T, D>(piece / pieces, piece % pieces * kPiece<T>)));
    }
  } else {
    FXA_NO_UNROLL
    for (int i = gpu::thread_index(); i < Rows * D; i += Threads) {
      const float x = gpu::to_float(tile.load(tile_place<T, D>(i / D, i % D)));
      bad |= !(x - x == 0.0f);
    }
  }
  return bad;
}

// The rows of a tile (at most 64) that hold NaN or infinity, as bits.
template <class T, int D, int Rows>
FXA_DEVICE uint64_t bad_rows(Shared<T> tile) {
  uint64_t bits = 0;
  FXA_NO_UNROLL
  for (int first = 0; first < Rows; first += 32) {
    const int row = first + gpu::lane_index();
    bool bad = false;
    FXA_NO_UNROLL
    for (int column = 0; column < D && row < Rows; column += kPiece<T>) {
      bad |= not_finite<T>(tile.template load_as<U4>(tile_place<T, D>(row, column)));
    }
    bits |= static_cast<uint64_t>(gpu::ballot(bad)) << first;
  }
  return bits;
}

}  // namespace fastxattn
