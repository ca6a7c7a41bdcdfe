// One block of the similarity matrix: operands, logits, and the gradient products. Shared by the losses.
#pragma once

#include "contrastive/contrastive.h"
#include "core/cpu/panels.h"

namespace fastxattn::FXA_ISA {

using Bits = vi;
FXA_INLINE vi load_bits(const int32_t* p) { return reinterpret_cast<vi>(load(reinterpret_cast<const float*>(p))); }
FXA_INLINE bool any(vi mask) {
#if defined(FXA_VEC512)
  return _mm512_test_epi32_mask(reinterpret_cast<__m512i>(mask), reinterpret_cast<__m512i>(mask)) != 0;
#else
  int32_t bits = 0;
  for (int i = 0; i < W; ++i) bits |= mask[i];
  return bits != 0;
#endif
}
FXA_INLINE float minus_infinity() { return -__builtin_inff(); }

// What a block needs of its columns, gathered so that lanes past the last column are dead.
struct Columns {
  int32_t id[kMaxBlock], dead[kMaxBlock], skip[kMaxBlock], index[kMaxBlock];
  float norm[kMaxBlock], limit[kMaxBlock], rank_at[kMaxBlock];
};

// Scratch of one worker, carved from the dispatcher's memory.
struct Block {
  int64_t i0, j0, rows, columns;  // place and size of the block
  int64_t lda, ldb;               // element strides of the panels
  int64_t depth;                  // panel depth in floats
  float *copy_a, *copy_b;         // padded copies of the panels
  float* strips;                  // packed columns
  float* tile;                    // [rows][kMaxBlock] logits, then dz
  float* halves;                  // bf16 products: dz as bf16, high and low parts, and their pairs
  Columns* columns_info;
};

static Block make_block(const ContrastiveParams& p, int64_t row_block, int64_t column_block, char* scratch) {
  Block k;
  k.i0 = row_block * p.a.block;
  k.j0 = column_block * p.b.block;
  k.rows = p.a.count - k.i0 < p.a.block ? p.a.count - k.i0 : p.a.block;
  k.columns = p.b.count - k.j0 < p.b.block ? p.b.count - k.j0 : p.b.block;
  k.depth = round_up(p.d, 32);
  float* at = reinterpret_cast<float*>(scratch);
  k.columns_info = reinterpret_cast<Columns*>(at);
  at += (sizeof(Columns) + 63) / 64 * 16;
  k.copy_a = at;
  k.copy_b = (at += kMaxBlock * k.depth);
  k.strips = (at += kMaxBlock * k.depth);
  k.tile = (at += kMaxBlock * k.depth);
  k.halves = (at += kMaxBlock * kMaxBlock);
  Columns& c = *k.columns_info;
  for (int64_t j = 0; j < kMaxBlock; ++j) {
    const bool live = j < k.columns;
    const int64_t column = k.j0 + (live ? j : 0);
    c.dead[j] = live ? 0 : -1;
    c.index[j] = static_cast<int32_t>(column);
    c.id[j] = live ? p.b.id[column] : -2;
    c.skip[j] = p.b.skip ? p.b.skip[column] : -2;
    c.norm[j] = p.b.norm ? p.b.norm[column] : 1.0f;
    c.limit[j] = p.b.limit ? p.b.limit[column] : __builtin_inff();
    c.rank_at[j] = p.b.rank_at ? p.b.rank_at[column] : __builtin_inff();
  }
  return k;
}

#if defined(FXA_HAS_BF16_DOT)
static bool uses_pairs(const ContrastiveParams& p) { return p.dtype == DType::bf16; }
#else
static bool uses_pairs(const ContrastiveParams&) { return false; }
#endif

static const float* f32_side(const ContrastiveParams& p, const ContrastiveSide& side, int64_t first, int64_t rows,
                             float* copy, int64_t* ld) {
  const int64_t at = first * side.stride;
  switch (p.dtype) {
    case DType::bf16: return f32_panel(static_cast<const bf16_t*>(side.data) + at, side.stride, rows, p.d, copy, ld);
    case DType::f16: return f32_panel(static_cast<const f16_t*>(side.data) + at, side.stride, rows, p.d, copy, ld);
    default: return f32_panel(static_cast<const float*>(side.data) + at, side.stride, rows, p.d, copy, ld);
  }
}

// Operands as the products left them, for the gradient products of the same block.
struct Operands {
  const void *a, *b;
};

// tile = A B^T.
static Operands block_product(const ContrastiveParams& p, Block& k) {
#if defined(FXA_HAS_BF16_DOT)
  if (uses_pairs(p)) {
    const auto side = [&](const ContrastiveSide& s, int64_t first, int64_t rows, float* copy, int64_t* ld) {
      const auto* src = static_cast<const bf16_t*>(s.data) + first * s.stride;
      return pair_panel(src, s.stride, rows, p.d, reinterpret_cast<bf16x2*>(copy), ld);
    };
    const int64_t depth = panel_depth<bf16x2>(p.d);
    const bf16x2* a = side(p.a, k.i0, k.rows, k.copy_a, &k.lda);
    const bf16x2* b = side(p.b, k.j0, k.columns, k.copy_b, &k.ldb);
    auto* strips = reinterpret_cast<bf16x2*>(k.strips);
    pack_strips(b, k.ldb, k.columns, depth, strips);
    similarity(a, k.lda, k.rows, strips, k.columns, depth, k.tile, kMaxBlock);
    return {a, b};
  }
#endif
  const int64_t depth = panel_depth<float>(p.d);
  const float* a = f32_side(p, p.a, k.i0, k.rows, k.copy_a, &k.lda);
  const float* b = f32_side(p, p.b, k.j0, k.columns, k.copy_b, &k.ldb);
  pack_strips(b, k.ldb, k.columns, depth, k.strips);
  similarity(a, k.lda, k.rows, k.strips, k.columns, depth, k.tile, kMaxBlock);
  return {a, b};
}

#if defined(FXA_HAS_BF16_DOT)
// Rows of pairs (ld pairs apart) to pairs of rows: out[r / 2][feature] holds rows r and r + 1 of one feature.
static void interleave_rows(const bf16_t* src, int64_t stride, int64_t rows, int64_t d, bf16x2* out, int64_t ldo) {
  for (int64_t r = 0; r < rows; r += 2) {
    const bf16_t* first = src + r * stride;
    const bf16_t* second = r + 1 < rows ? first + stride : nullptr;
    bf16x2* to = out + r / 2 * ldo;
    int64_t f = 0;
    for (; f + W <= d; f += W) {
      const vu low = __builtin_convertvector(*reinterpret_cast<const vh_unaligned*>(first + f), vu);
      const vu high = second ? __builtin_convertvector(*reinterpret_cast<const vh_unaligned*>(second + f), vu) : vu{};
      store(reinterpret_cast<float*>(to + f), reinterpret_cast<vf>(low | high << 16));
    }
    for (; f < ldo; ++f) {
      const uint32_t low = f < d ? first[f].bits : 0, high = f < d && second ? second[f].bits : 0;
      to[f].bits = low | high << 16;
    }
  }
}

// The gradient products on bf16 pairs: dz as its bf16 rounding, plus the remainder's where `low_a`/`low_b` say so.
static void pair_gradients(const ContrastiveParams& p, Block& k, const Operands& op, bool low_a, bool low_b) {
  const int64_t depth = k.depth;
  auto* interleaved = reinterpret_cast<bf16x2*>(k.strips);                 // the packed columns are not needed any more
  auto* parts = reinterpret_cast<bf16_t*>(k.halves);                       // [rows][kMaxBlock]
  auto* pairs = reinterpret_cast<bf16x2*>(parts + kMaxBlock * kMaxBlock);  // [rows / 2][kMaxBlock]
  const int64_t rows_even = round_up(k.rows, 2), columns_even = round_up(k.columns, 2);
  const bool low = low_a || low_b;
  for (int part = 0; part < (low ? 2 : 1); ++part) {
    for (int64_t i = 0; i < rows_even; ++i) {
      for (int64_t j = 0; j < round_up(k.columns, W); j += W) {
        float* at = k.tile + i * kMaxBlock + j;
        const vf x = i < k.rows ? load(at) : zero();
        store_from_f32(parts + i * kMaxBlock + j, x);
        if (low && part == 0 && i < k.rows) store(at, x - load_as_f32(parts + i * kMaxBlock + j));
      }
    }
    if (p.a.grad_data && (part == 0 || low_a)) {
      interleave_rows(static_cast<const bf16_t*>(op.b), 2 * k.ldb, k.columns, p.d, interleaved, depth);
      gemm<bf16x2, AOrder::rows, Init::add>(k.rows, depth, columns_even / 2, reinterpret_cast<bf16x2*>(parts),
                                            kMaxBlock / 2, interleaved, depth, p.a.grad_data + k.i0 * p.depth, p.depth);
    }
    if (p.b.grad_data && (part == 0 || low_b)) {
      interleave_rows(parts, kMaxBlock, k.rows, kMaxBlock, pairs, kMaxBlock);
      interleave_rows(static_cast<const bf16_t*>(op.a), 2 * k.lda, k.rows, p.d, interleaved, depth);
      gemm<bf16x2, AOrder::columns, Init::add>(k.columns, depth, rows_even / 2, pairs, kMaxBlock, interleaved, depth,
                                               p.b.grad_data + k.j0 * p.depth, p.depth);
    }
  }
}
#endif

// grad_a += dz B and grad_b += dz^T A, with dz in the tile (its dead lanes zero).
static void block_gradients(const ContrastiveParams& p, Block& k, const Operands& op, bool low_a, bool low_b) {
#if defined(FXA_HAS_BF16_DOT)
  if (uses_pairs(p)) return pair_gradients(p, k, op, low_a, low_b);
#endif
  (void)low_a, (void)low_b;
  const int64_t lanes = panel_depth<float>(p.d);
  if (p.a.grad_data) {
    gemm<float, AOrder::rows, Init::add>(k.rows, lanes, k.columns, k.tile, kMaxBlock, static_cast<const float*>(op.b),
                                         k.ldb, p.a.grad_data + k.i0 * p.depth, p.depth);
  }
  if (p.b.grad_data) {
    gemm<float, AOrder::columns, Init::add>(k.columns, lanes, k.rows, k.tile, kMaxBlock,
                                            static_cast<const float*>(op.a), k.lda, p.b.grad_data + k.j0 * p.depth,
                                            p.depth);
  }
}

// Whether rounding dz to bf16 would be seen beside the coefficient of the row (column): the energy of the block's
// entries against this block's share of (coefficient / 4)^2: left out, the remainders cost at most 4e-4 of the
// gradient.
FXA_INLINE bool rounding_shows(float energy, float coefficient, int64_t part, int64_t whole) {
  return !(energy * static_cast<float>(whole) <= 0.0625f * coefficient * coefficient * static_cast<float>(part));
}

}  // namespace fastxattn::FXA_ISA
