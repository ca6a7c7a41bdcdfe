// Best matches of one group of sets against another, and the sparse gradient along them.
#include <type_traits>

#include "core/cpu/panels.h"
#include "late_interaction/late_interaction.h"

namespace fastxattn::FXA_ISA {

FXA_INLINE vi lane_numbers() {
  vi r;
  for (int i = 0; i < W; ++i) r[i] = i;
  return r;
}

// The better of two candidates: the larger, the first of equals; NaN beats everything and stays.
FXA_INLINE void take_better(vf x, vi place, vf* best, vi* at) {
  const vi better = (x > *best) | ((x != x) & (*best == *best));
  *best = better ? x : *best;
  *at = better ? place : *at;
}

// Similarities of a block of tokens: rows [i0, i0 + rows) of a with rows [j0, j0 + columns) of b.
static void token_product(const LateInteractionParams& p, int64_t i0, int64_t rows, int64_t j0, int64_t columns,
                          float* copy_a, float* copy_b, float* strips, float* tile) {
  const auto run = [&](auto* a, int64_t lda, auto* b, int64_t ldb, int64_t depth) {
    using E = std::remove_const_t<std::remove_pointer_t<decltype(a)>>;
    pack_strips(b, ldb, columns, depth, reinterpret_cast<E*>(strips));
    similarity(a, lda, rows, reinterpret_cast<const E*>(strips), columns, depth, tile, kTokenBlock);
  };
  int64_t lda = 0, ldb = 0;
#if defined(FXA_HAS_BF16_DOT)
  if (p.dtype == DType::bf16) {
    const auto* a = static_cast<const bf16_t*>(p.a.data) + i0 * p.d;
    const auto* b = static_cast<const bf16_t*>(p.b.data) + j0 * p.d;
    const bf16x2* pa = pair_panel(a, p.d, rows, p.d, reinterpret_cast<bf16x2*>(copy_a), &lda);
    const bf16x2* pb = pair_panel(b, p.d, columns, p.d, reinterpret_cast<bf16x2*>(copy_b), &ldb);
    return run(pa, lda, pb, ldb, panel_depth<bf16x2>(p.d));
  }
#endif
  const auto panel = [&](const TokenSets& side, int64_t first, int64_t count, float* copy, int64_t* ld) {
    const int64_t at = first * p.d;
    switch (p.dtype) {
      case DType::bf16: return f32_panel(static_cast<const bf16_t*>(side.data) + at, p.d, count, p.d, copy, ld);
      case DType::f16: return f32_panel(static_cast<const f16_t*>(side.data) + at, p.d, count, p.d, copy, ld);
      default: return f32_panel(static_cast<const float*>(side.data) + at, p.d, count, p.d, copy, ld);
    }
  };
  const float* a = panel(p.a, i0, rows, copy_a, &lda);
  const float* b = panel(p.b, j0, columns, copy_b, &ldb);
  run(a, lda, b, ldb, panel_depth<float>(p.d));
}

// Best of columns [first, last) of each row, going on from best/at when `more`.
static void best_in_rows(const float* tile, int64_t rows, int64_t first, int64_t last, int32_t offset, bool more,
                         float* best, int32_t* at) {
  const vf floor = splat(-__builtin_inff());
  for (int64_t r = 0; r < rows; ++r) {
    const float* x = tile + r * kTokenBlock;
    vf top = floor;
    vi place = splat(-1);
    int64_t c = first;
    for (; c + W <= last; c += W) {
      take_better(load(x + c), lane_numbers() + splat(static_cast<int32_t>(c - first)), &top, &place);
    }
    float value = -__builtin_inff();
    int32_t where = -1;
    const auto offer = [&](float candidate, int32_t index) {
      const bool nan = candidate != candidate, held = value != value;
      const bool first_of_equals = index < where && (candidate == value || (nan && held));
      if (where < 0 || (candidate > value) || (nan && !held) || first_of_equals) value = candidate, where = index;
    };
    for (int l = 0; l < W; ++l) {
      if (place[l] >= 0) offer(top[l], place[l]);
    }
    for (; c < last; ++c) offer(x[c], static_cast<int32_t>(c - first));
    const bool better = where >= 0 && ((value > best[r]) || (value != value && best[r] == best[r]));
    if (more && !better) continue;
    best[r] = value;
    at[r] = where < 0 ? -1 : where + offset;
  }
}

// Best of rows [first, last) of each column.
static void best_in_columns(const float* tile, int64_t first, int64_t last, int64_t columns, int32_t offset, bool more,
                            float* best, int32_t* at) {
  for (int64_t c = 0; c < columns; c += W) {
    const int n = columns - c < W ? static_cast<int>(columns - c) : W;
    vf top = more ? load_first(best + c, n) : splat(-__builtin_inff());
    vi place = splat(-1);
    if (more) place = reinterpret_cast<vi>(load_first(reinterpret_cast<const float*>(at + c), n));
    for (int64_t r = first; r < last; ++r) {
      take_better(load(tile + r * kTokenBlock + c), splat(static_cast<int32_t>(r - first) + offset), &top, &place);
    }
    // A first row of -inf everywhere is still the best there is.
    if (last > first) place = place < splat(0) ? splat(offset) : place;
    store_first(best + c, top, n);
    store_first(reinterpret_cast<float*>(at + c), reinterpret_cast<vf>(place), n);
  }
}

void late_interaction_block(const LateInteractionParams& p, int64_t group_a, int64_t group_b, char* scratch) {
  const int64_t depth = round_up(p.d, 32);
  float* copy_a = reinterpret_cast<float*>(scratch);
  float* copy_b = copy_a + kTokenBlock * depth;
  float* strips = copy_b + kTokenBlock * depth;
  float* tile = strips + kTokenBlock * depth;
  float* best = tile + kTokenBlock * kTokenBlock;
  int32_t* at = reinterpret_cast<int32_t*>(best + kTokenBlock);
  float* best_columns = reinterpret_cast<float*>(at + kTokenBlock);  // (tokens of a long set of b)
  int32_t* at_columns = reinterpret_cast<int32_t*>(best_columns + p.b.tokens);
  const int64_t n0 = p.a.group[group_a], n1 = p.a.group[group_a + 1];
  const int64_t m0 = p.b.group[group_b], m1 = p.b.group[group_b + 1];
  const int64_t begin_a = p.a.cu[n0], end_a = p.a.cu[n1], begin_b = p.b.cu[m0], end_b = p.b.cu[m1];

  for (int64_t i0 = begin_a; i0 < end_a; i0 += kTokenBlock) {
    const int64_t rows = end_a - i0 < kTokenBlock ? end_a - i0 : kTokenBlock;
    for (int64_t j0 = begin_b; j0 < end_b; j0 += kTokenBlock) {
      const int64_t columns = end_b - j0 < kTokenBlock ? end_b - j0 : kTokenBlock;
      token_product(p, i0, rows, j0, columns, copy_a, copy_b, strips, tile);
      const bool last_rows = i0 + rows == end_a, last_columns = j0 + columns == end_b;
      for (int64_t m = m0; p.from_a && m < m1; ++m) {
        // Within a block a group has several whole sets, or a part of one.
        const int64_t c0 = p.b.cu[m] > j0 ? p.b.cu[m] - j0 : 0;
        const int64_t c1 = p.b.cu[m + 1] < j0 + columns ? p.b.cu[m + 1] - j0 : columns;
        if (c1 <= c0) continue;
        best_in_rows(tile, rows, c0, c1, static_cast<int32_t>(j0 + c0 - p.b.cu[m]), j0 > begin_b, best, at);
        if (!last_columns) continue;
        for (int64_t n = n0; n < n1; ++n) {
          const int64_t r0 = p.a.cu[n] > i0 ? p.a.cu[n] - i0 : 0;
          const int64_t r1 = p.a.cu[n + 1] < i0 + rows ? p.a.cu[n + 1] - i0 : rows;
          float sum = 0;
          for (int64_t r = r0; r < r1; ++r) {
            sum += best[r];
            p.a.best[(i0 + r) * p.b.sets + m] = at[r];
          }
          p.a.best_sum[n * p.b.sets + m] += sum;
        }
      }
      for (int64_t n = n0; p.from_b && n < n1; ++n) {
        const int64_t r0 = p.a.cu[n] > i0 ? p.a.cu[n] - i0 : 0;
        const int64_t r1 = p.a.cu[n + 1] < i0 + rows ? p.a.cu[n + 1] - i0 : rows;
        if (r1 <= r0) continue;
        float* best_here = best_columns + (j0 - begin_b);
        int32_t* at_here = at_columns + (j0 - begin_b);
        best_in_columns(tile, r0, r1, columns, static_cast<int32_t>(i0 + r0 - p.a.cu[n]), i0 > begin_a, best_here,
                        at_here);
        if (!last_rows) continue;
        for (int64_t m = m0; m < m1; ++m) {
          const int64_t c0 = p.b.cu[m] > j0 ? p.b.cu[m] - j0 : 0;
          const int64_t c1 = p.b.cu[m + 1] < j0 + columns ? p.b.cu[m + 1] - j0 : columns;
          float sum = 0;
          for (int64_t c = c0; c < c1; ++c) {
            sum += best_here[c];
            p.b.best[(j0 + c) * p.a.sets + n] = at_here[c];
          }
          p.b.best_sum[n * p.b.sets + m] += sum;
        }
      }
    }
  }
}

template <class T>
FXA_INLINE void add_scaled(const T* x, float factor, float* out, int64_t d) {
  const vf f = splat(factor);
  int64_t k = 0;
  for (; k + W <= d; k += W) store(out + k, fma(load_as_f32(x + k), f, load(out + k)));
  for (; k < d; ++k) out[k] += to_f32(x[k]) * factor;
}

// Gradient of one side's tokens in sets [first, last): from its own best matches, and from where it is the best match.
template <class T>
static void sparse_gradient(const TokenSets& self, const TokenSets& other, bool own, bool matched, bool is_a, int64_t d,
                            int64_t first, int64_t last) {
  const T* rows = static_cast<const T*>(other.data);
  for (int64_t o = 0; o < other.sets; ++o) {
    for (int64_t s = first; s < last; ++s) {
      const int64_t score = is_a ? s * other.sets + o : o * self.sets + s;
      if (own && self.grad[score] != 0) {
        for (int64_t t = self.cu[s]; t < self.cu[s + 1]; ++t) {
          const int32_t at = self.best[t * other.sets + o];
          if (at >= 0) add_scaled(rows + (other.cu[o] + at) * d, self.grad[score], self.grad_data + t * d, d);
        }
      }
      if (matched && other.grad[score] != 0) {
        for (int64_t t = other.cu[o]; t < other.cu[o + 1]; ++t) {
          const int32_t at = other.best[t * self.sets + s];
          if (at >= 0) add_scaled(rows + t * d, other.grad[score], self.grad_data + (self.cu[s] + at) * d, d);
        }
      }
    }
  }
}

void late_interaction_gradient(const LateInteractionParams& p, bool is_a, int64_t first, int64_t last) {
  const TokenSets &self = is_a ? p.a : p.b, &other = is_a ? p.b : p.a;
  const bool own = is_a ? p.from_a : p.from_b, matched = is_a ? p.from_b : p.from_a;
  switch (p.dtype) {
    case DType::bf16: return sparse_gradient<bf16_t>(self, other, own, matched, is_a, p.d, first, last);
    case DType::f16: return sparse_gradient<f16_t>(self, other, own, matched, is_a, p.d, first, last);
    default: return sparse_gradient<float>(self, other, own, matched, is_a, p.d, first, last);
  }
}

}  // namespace fastxattn::FXA_ISA
