// ldmatrix and mma: what the last lane to arrive computes for its warp. Fragments lie as the PTX manual draws them.
#include "simt/device.h"

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

}  // namespace fastxattn::gpu::detail
