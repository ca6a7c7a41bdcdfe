// ldmatrix, mma and wgmma: what the last lane to arrive computes for its warp or warp group. Fragments lie as the PTX
// manual draws them.
#include "core/cuda/hopper.h"

namespace fastxattn::gpu::detail {
namespace {

using simt::Runner;

// Tensor cores add exact products in wide registers and cut the sum off towards zero.
float cut(double x) {
  const auto f = static_cast<float>(x);
  if (!std::isfinite(f) || std::fabs(static_cast<double>(f)) <= std::fabs(x)) return f;
  return std::bit_cast<float>(std::bit_cast<uint32_t>(f) - 1);
}

// d (16, 8) += a (16, K) b (K, 8), eight products at a time.
template <int K>
void multiply(float (&d)[16][8], const float (&a)[16][K], const float (&b)[K][8]) {
  for (int i = 0; i < 16; ++i) {
    for (int first = 0; first < K; first += 8) {
      double sum[8];
      for (int j = 0; j < 8; ++j) sum[j] = d[i][j];
      for (int k = first; k < first + 8; ++k) {
        const double x = a[i][k];
        for (int j = 0; j < 8; ++j) sum[j] += x * b[k][j];
      }
      for (int j = 0; j < 8; ++j) d[i][j] = cut(sum[j]);
    }
  }
}

template <int K>
void multiply_fragments(const float (&a)[16][K], const float (&b)[K][8], void** lanes) {
  float d[16][8];
  for (int lane = 0; lane < 32; ++lane) {
    const float* mine = static_cast<Mma*>(lanes[lane])->d;
    for (int e = 0; e < 4; ++e) d[lane / 4 + e / 2 * 8][lane % 4 * 2 + e % 2] = mine[e];
  }
  multiply<K>(d, a, b);
  for (int lane = 0; lane < 32; ++lane) {
    float* mine = static_cast<Mma*>(lanes[lane])->d;
    for (int e = 0; e < 4; ++e) mine[e] = d[lane / 4 + e / 2 * 8][lane % 4 * 2 + e % 2];
  }
  ++Runner::current().counts().mma;
}

}  // namespace

// Lane 8 m + i names row i of matrix m; lane l gets elements (l / 4, 2 (l % 4) + {0, 1}), transposed or not.
template <int Count, bool Transposed>
void ldmatrix(int warp, void** lanes) {
  Runner& r = Runner::current();
  for (int m = 0; m < Count; ++m) {
    uint16_t matrix[8][8];
    uint32_t rows[8];
    for (int i = 0; i < 8; ++i) {
      rows[i] = static_cast<MatrixLoad*>(lanes[8 * m + i])->row;
      std::memcpy(matrix[i], r.shared_load(rows[i], 16, warp * 32 + 8 * m + i, nullptr), 16);
    }
    r.count_matrix_rows(rows);
    for (int lane = 0; lane < 32; ++lane) {
      const int i = lane / 4, j = lane % 4 * 2;
      const uint16_t low = Transposed ? matrix[j][i] : matrix[i][j];
      const uint16_t high = Transposed ? matrix[j + 1][i] : matrix[i][j + 1];
      static_cast<MatrixLoad*>(lanes[lane])->out[m] = low | static_cast<uint32_t>(high) << 16;
    }
  }
}
template void ldmatrix<1, false>(int, void**);
template void ldmatrix<2, false>(int, void**);
template void ldmatrix<4, false>(int, void**);
template void ldmatrix<1, true>(int, void**);
template void ldmatrix<2, true>(int, void**);
template void ldmatrix<4, true>(int, void**);

template <class T>
void mma_m16n8k16(int, void** lanes) {
  float a[16][16], b[16][8];
  const auto half = [](uint32_t word, int high) { return high != 0 ? unpack_high<T>(word) : unpack_low<T>(word); };
  for (int lane = 0; lane < 32; ++lane) {
    const auto* mine = static_cast<Mma*>(lanes[lane]);
    const int group = lane / 4, pair = lane % 4 * 2;
    for (int e = 0; e < 2; ++e) {
      for (int r = 0; r < 4; ++r) a[group + r % 2 * 8][pair + r / 2 * 8 + e] = half(mine->a[r], e);
      for (int r = 0; r < 2; ++r) b[pair + r * 8 + e][group] = half(mine->b[r], e);
    }
  }
  multiply_fragments<16>(a, b, lanes);
}
template void mma_m16n8k16<f16_t>(int, void**);
template void mma_m16n8k16<bf16_t>(int, void**);

// The low 13 bits of the operands are not looked at.
void mma_m16n8k8_tf32(int, void** lanes) {
  float a[16][8], b[8][8];
  const auto tf32 = [](uint32_t bits) { return float_of(bits & 0xffffe000u); };
  for (int lane = 0; lane < 32; ++lane) {
    const auto* mine = static_cast<Mma*>(lanes[lane]);
    const int group = lane / 4, in_group = lane % 4;
    for (int r = 0; r < 4; ++r) a[group + r % 2 * 8][in_group + r / 2 * 4] = tf32(mine->a[r]);
    for (int r = 0; r < 2; ++r) b[in_group + r * 4][group] = tf32(mine->b[r]);
  }
  multiply_fragments<8>(a, b, lanes);
}

namespace {

// A matrix descriptor: where the operand starts, and the distances of its panels and of its groups of 8 rows.
struct Descriptor {
  uint32_t start, panel, rows;

  explicit Descriptor(uint64_t bits) {
    const auto field = [&](int first) { return static_cast<uint32_t>(bits >> first & 0x3fffu) << 4; };
    start = field(0), panel = field(16), rows = field(32);
    if (bits >> 62 != 1 || (bits >> 46 & 0xffffu) != 0) {
      Runner::current().fault("a matrix descriptor must have swizzles of 128 bytes and no offset");
    }
  }
  // The 16 bytes at `piece` of `row`; swizzling exchanges bits of the address.
  uint32_t place(int row, int piece) const {
    const uint32_t in_row = start + static_cast<uint32_t>(piece % 8) * 16;
    const uint32_t plain = in_row + static_cast<uint32_t>(piece / 8) * panel +
                           static_cast<uint32_t>(row / kSwizzleRows) * rows +
                           static_cast<uint32_t>(row % kSwizzleRows) * kSwizzledBytes;
    return plain ^ (plain >> 3 & 0x70u);
  }
};

// `rows` rows of `pieces` times eight elements, as wgmma reads them.
template <class T>
std::vector<float> matrix(uint64_t bits, int rows, int pieces, const std::vector<uint32_t>& known, int group) {
  const Descriptor from(bits);
  std::vector<float> values;
  for (int i = 0; i < rows; ++i) {
    for (int piece = 0; piece < pieces; ++piece) {
      T eight[8];
      std::memcpy(eight, Runner::current().matrix_read(from.place(i, piece), known, group), 16);
      for (T x : eight) values.push_back(to_float(x));
    }
  }
  return values;
}

}  // namespace

// D (64, columns): lane l of warp w has rows 16 w + l / 4 and 8 further down, columns 2 (l % 4) + {0, 1} of each eight.
// Depth: A is in registers, and the rows of B run along the depth.
template <class T, bool Depth>
void wgmma(int warp, void** lanes) {
  Runner& r = Runner::current();
  const auto lane = [&](int i) -> const Wgmma& { return *static_cast<Wgmma*>(lanes[i]); };
  const Wgmma& first = lane(0);
  for (int i = 1; i < 128; ++i) {
    const Wgmma& mine = lane(i);
    if (mine.a != first.a || mine.b != first.b || mine.add != first.add || mine.columns != first.columns) {
      r.fault("the threads of a warp group bring different operands to a wgmma");
    }
  }
  const std::vector<uint32_t> known = r.known_to_group(warp / 4);
  const int n = first.columns;
  const auto b = Depth ? matrix<T>(first.b, 16, n / 8, known, warp / 4) : matrix<T>(first.b, n, 2, known, warp / 4);
  std::vector<float> a(64 * 16);
  if constexpr (Depth) {
    for (int i = 0; i < 128; ++i) {
      uint32_t words[4];
      std::memcpy(words, lane(i).fragments->visible + static_cast<size_t>(lane(i).step) * 16, 16);
      for (int e = 0; e < 4; ++e) {
        float* to = a.data() + (i / 4 / 8 * 16 + i / 4 % 8 + e % 2 * 8) * 16 + i % 4 * 2 + e / 2 * 8;
        to[0] = unpack_low<T>(words[e]), to[1] = unpack_high<T>(words[e]);
      }
    }
  } else {
    a = matrix<T>(first.a, 64, 2, known, warp / 4);
  }
  std::vector<double> depth_first(static_cast<size_t>(16 * n));  // B by depth and column
  for (int k = 0; k < 16; ++k) {
    for (int j = 0; j < n; ++j)
      depth_first[static_cast<size_t>(k * n + j)] = b[static_cast<size_t>(Depth ? k * n + j : j * 16 + k)];
  }
  std::vector<double> sums(static_cast<size_t>(n));
  for (int i = 0; i < 64; ++i) {
    const int owner = i / 16 * 32 + i % 8 * 4, half = i % 16 / 8 * 2;
    const auto place = [&](int j) {
      return reinterpret_cast<float*>(lane(owner + j % 8 / 2).d->results) + j / 8 * 4 + half + j % 2;
    };
    for (int j = 0; j < n; ++j) sums[static_cast<size_t>(j)] = first.add ? static_cast<double>(*place(j)) : 0.0;
    for (int k = 0; k < 16; ++k) {
      const double x = a[static_cast<size_t>(i * 16 + k)];
      const double* row = depth_first.data() + k * n;
      for (int j = 0; j < n; ++j) sums[static_cast<size_t>(j)] += x * row[j];
      if (k % 8 == 7) {
        for (auto& sum : sums) sum = static_cast<double>(cut(sum));
      }
    }
    for (int j = 0; j < n; ++j) *place(j) = static_cast<float>(sums[static_cast<size_t>(j)]);
  }
  ++r.counts().wgmma;
}
template void wgmma<f16_t, false>(int, void**);
template void wgmma<f16_t, true>(int, void**);
template void wgmma<bf16_t, false>(int, void**);
template void wgmma<bf16_t, true>(int, void**);

}  // namespace fastxattn::gpu::detail
