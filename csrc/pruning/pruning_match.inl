// Similarity kernels: bipartite matching, and greedy diverse subsets. Built on the shared matrix product.
//
// A panel holds 64 unit rows as columns: panel[k * 64 + j] = unit(row j)[k]. Missing and non-finite rows are zero.
#pragma once

#include "core/cpu/gemm.h"
#include "pruning/pruning.h"

namespace fastxattn::FXA_ISA {

using namespace fastxattn::pruning;

static_assert(kPanel % (kMaxN * W) == 0, "a panel must be whole column tiles");

// Squares of float32 overflow from 1e19 on and vanish below 1e-19: such rows are measured in double.
template <class T>
static float inverse_norm_wide(const T* row, int64_t channels) {
  double total = 0;
  for (int64_t c = 0; c < channels; ++c) total += static_cast<double>(to_f32(row[c])) * to_f32(row[c]);
  if (!(total < __builtin_inf())) return __builtin_nanf("");
  const double inverse = total > 0 ? 1.0 / __builtin_sqrt(total) : 0.0;
  return static_cast<float>(inverse < 3e38 ? inverse : 3e38);
}

template <class T>
static float inverse_norm(const T* row, int64_t channels) {
  vf sum = zero();
  int64_t c = 0;
  for (; c + W <= channels; c += W) {
    const vf v = load_as_f32(row + c);
    sum = fma(v, v, sum);
  }
  float total = reduce_add(sum);
  for (; c < channels; ++c) total += to_f32(row[c]) * to_f32(row[c]);
  if (!(total < __builtin_inff()) || total < 1e-30f) return inverse_norm_wide(row, channels);
  return 1.0f / __builtin_sqrtf(total);
}

// One panel of `rows` <= 64 rows x[index[j]] (or x[j] without an index); finite[j] says whether a row could be used.
template <class T>
static void pack_panel(const T* x, const int32_t* index, int64_t rows, int64_t channels, float* panel,
                       uint8_t* finite) {
  for (int64_t base = 0; base < kPanel; base += W) {
    const T* from[W];
    float scale[W];
    for (int j = 0; j < W; ++j) {
      const int64_t at = base + j;
      from[j] = nullptr;
      if (at >= rows) continue;
      const T* row = x + (index != nullptr ? index[at] : at) * channels;
      scale[j] = inverse_norm(row, channels);
      finite[at] = scale[j] == scale[j];
      if (finite[at]) from[j] = row;
    }
    int64_t c = 0;
    for (; c + W <= channels; c += W) {
      vf tile[W];
      for (int j = 0; j < W; ++j) tile[j] = from[j] != nullptr ? load_as_f32(from[j] + c) * splat(scale[j]) : zero();
      transpose(tile);
      for (int j = 0; j < W; ++j) store(panel + (c + j) * kPanel + base, tile[j]);
    }
    for (; c < channels; ++c) {
      for (int j = 0; j < W; ++j)
        panel[c * kPanel + base + j] = from[j] != nullptr ? to_f32(from[j][c]) * scale[j] : 0.0f;
    }
  }
}

void pruning_pack(const void* x, DType dtype, const int32_t* index, int64_t rows, int64_t channels, float* panel,
                  uint8_t* finite) {
  if (dtype == DType::f32) return pack_panel(static_cast<const float*>(x), index, rows, channels, panel, finite);
  if (dtype == DType::bf16) return pack_panel(static_cast<const bf16_t*>(x), index, rows, channels, panel, finite);
  pack_panel(static_cast<const f16_t*>(x), index, rows, channels, panel, finite);
}

// Depth after which a partial sum is stored, so that both panels' share of it stays in the first-level cache.
static constexpr int64_t kDepth = 64;

// All products of two panels: out[i * ld + j] = <row i of a, row j of b>.
FXA_INLINE void panel_products(const float* a, const float* b, int64_t channels, float* out, int64_t ld) {
  gemm<float, AOrder::columns, Init::zero>(kPanel, kPanel, channels < kDepth ? channels : kDepth, a, kPanel, b, kPanel,
                                           out, ld);
  for (int64_t k = kDepth; k < channels; k += kDepth) {
    gemm<float, AOrder::columns, Init::add>(kPanel, kPanel, channels - k < kDepth ? channels - k : kDepth,
                                            a + k * kPanel, kPanel, b + k * kPanel, kPanel, out, ld);
  }
}

// One panel of A (places [begin, end) of a_index) against every panel of its sequence's B.
void pruning_match(const MatchParams& p, int64_t begin, int64_t end, int64_t b_begin, int64_t b_end,
                   const float* b_panels, const uint8_t* b_finite, float* a_panel, float* tile) {
  uint8_t finite[kPanel];
  const int64_t rows = end - begin;
  pruning_pack(p.x, p.dtype, p.a_index + begin, rows, p.channels, a_panel, finite);
  float best[kPanel][W];
  int32_t where[kPanel][W];
  for (int64_t i = 0; i < rows; ++i)
    for (int l = 0; l < W; ++l) best[i][l] = -__builtin_inff(), where[i][l] = -1;
  vi lane;
  for (int l = 0; l < W; ++l) lane[l] = l;
  for (int64_t b = b_begin; b < b_end; b += kPanel) {
    const int64_t panel = (b - b_begin) / kPanel;
    panel_products(a_panel, b_panels + panel * kPanel * p.channels, p.channels, tile, kPanel);
    // Lanes that stand for no row, or for one that is not finite, must not win.
    vf usable[kPanel / W];
    for (int64_t j = 0; j < kPanel; ++j)
      usable[j / W][j % W] = b + j < b_end && b_finite[b - b_begin + j] ? 0.0f : __builtin_nanf("");
    for (int64_t i = 0; i < rows; ++i) {
      vf top = load(best[i]);
      vi at;
      std::memcpy(&at, where[i], sizeof(at));
#pragma GCC unroll 8
      for (int64_t j = 0; j < kPanel / W; ++j) {
        const vf value = load(tile + i * kPanel + j * W) + usable[j];
        const vi better = value > top;
        top = better ? value : top;
        at = better ? lane + static_cast<int32_t>(b - b_begin + j * W) : at;
      }
      store(best[i], top);
      std::memcpy(where[i], &at, sizeof(at));
    }
  }
  for (int64_t i = 0; i < rows; ++i) {
    int chosen = -1;
    for (int l = 0; l < W; ++l) {
      if (where[i][l] < 0) continue;
      if (chosen < 0 || best[i][l] > best[i][chosen] ||
          (best[i][l] == best[i][chosen] && where[i][l] < where[i][chosen]))
        chosen = l;
    }
    const bool known = finite[i] && chosen >= 0;
    p.similarity[begin + i] = known ? best[i][chosen] : __builtin_nanf("");
    p.best[begin + i] = b_begin == b_end ? -1 : p.b_index[b_begin + (known ? where[i][chosen] : 0)];
  }
}

// Similarities of token i to every token.
static const float* similarity_row(const GreedyScratch& s, int64_t i, int64_t padded, int64_t channels, bool stored) {
  if (stored) return s.gram + i * padded;
  for (int64_t j = 0; j < padded; j += kPanel) {
    gemm<float, AOrder::columns, Init::zero>(1, kPanel, channels,
                                             s.panel_memory + i / kPanel * kPanel * channels + i % kPanel, kPanel,
                                             s.panel_memory + j * channels, kPanel, s.row + j, kPanel);
  }
  return s.row;
}

// The first of the largest values; NaN stands for what was picked already. `value` is padded with NaN.
static int64_t first_best(const float* value, int64_t padded) {
  vf top = splat(-__builtin_inff());
  vi where = splat(-1), lane;
  for (int l = 0; l < W; ++l) lane[l] = l;
  for (int64_t i = 0; i < padded; i += W) {
    const vf here = load(value + i);
    const vi better = here > top;
    top = better ? here : top;
    where = better ? lane + static_cast<int32_t>(i) : where;
  }
  int64_t at = -1;
  for (int l = 0; l < W; ++l) {
    if (where[l] >= 0 && (at < 0 || top[l] > value[at] || (top[l] == value[at] && where[l] < at))) at = where[l];
  }
  for (int64_t i = 0; at < 0 && i < padded; ++i) at = value[i] == value[i] ? i : -1;  // nothing above -inf
  return at;
}

// One tile of the similarity matrix and, across the diagonal, its mirror image.
void pruning_gram(const GreedyScratch& s, int64_t i, int64_t j, int64_t padded, int64_t channels) {
  float* tile = s.gram + i * kPanel * padded + j * kPanel;
  panel_products(s.panel_memory + i * kPanel * channels, s.panel_memory + j * kPanel * channels, channels, tile,
                 padded);
  if (i == j) return;
  float* mirror = s.gram + j * kPanel * padded + i * kPanel;
  for (int64_t r = 0; r < kPanel; r += W)
    for (int64_t c = 0; c < kPanel; c += W) {
      vf block[W];
      for (int l = 0; l < W; ++l) block[l] = load(tile + (r + l) * padded + c);
      transpose(block);
      for (int l = 0; l < W; ++l) store(mirror + (c + l) * padded + r, block[l]);
    }
}

// value[i] = minus the largest similarity of i to another finite token. Spoils the diagonal of a stored matrix, which
// nothing reads afterwards.
static void nearest_others(const GreedyScratch& s, int64_t n, int64_t padded, int64_t channels, bool stored) {
  float* shut = s.row;
  for (int64_t j = 0; j < padded; ++j) shut[j] = j < n && s.finite[j] ? 0.0f : -__builtin_inff();
  for (int64_t i = 0; i < n; i += kPanel) {
    float* strip = stored ? s.gram + i * padded : s.gram;
    for (int64_t j = 0; !stored && j < padded; j += kPanel)
      panel_products(s.panel_memory + i * channels, s.panel_memory + j * channels, channels, strip + j, padded);
    for (int64_t r = i; r < i + kPanel && r < n; ++r) {
      float* row = strip + (r - i) * padded;
      row[r] = -__builtin_inff();
      vf top = splat(-__builtin_inff());
      for (int64_t j = 0; j < padded; j += W) top = max(load(row + j) + load(shut + j), top);
      s.value[r] = -reduce_max(top);
    }
  }
}

static bool is_zero(const GreedyScratch& s, int64_t i, int64_t padded, int64_t channels, bool stored) {
  if (stored) return s.gram[i * padded + i] == 0.0f;
  const float* column = s.panel_memory + i / kPanel * kPanel * channels + i % kPanel;
  for (int64_t c = 0; c < channels; ++c)
    if (column[c * kPanel] != 0.0f) return false;
  return true;
}

static void update_nearest(const GreedyScratch& s, const float* row, int64_t padded) {
  for (int64_t j = 0; j < padded; j += W) store(s.value + j, min(zero() - load(row + j), load(s.value + j)));
}

// Adds the pick's row to the Cholesky factor and takes it off the residuals.
static void update_residual(const GreedyScratch& s, const float* similarity, const float* quality, int64_t i,
                            int64_t steps, int64_t padded, float floor) {
  float* factor = s.factors + steps * padded;
  const float root = 1.0f / __builtin_sqrtf(s.value[i]);
  for (int64_t j = 0; j < padded; j += W) {
    vf e = load(similarity + j) * load(quality + j) * splat(quality[i]);
    for (int64_t t = 0; t < steps; ++t) {
      const float* other = s.factors + t * padded;
      e = e - load(other + j) * splat(other[i]);
    }
    e = e * splat(root);
    store(factor + j, e);
    const vf old = load(s.value + j);
    const vf left = fma(zero() - e, e, old);
    const vf clean = left <= splat(floor) ? zero() : left;
    store(s.value + j, old >= zero() ? clean : old);  // picked (NaN) and unusable (-inf) stay what they are
  }
}

// The search in one sequence, whose rows are packed and, up to kStoredGram of them, whose similarities are known.
// `quality` (padded) holds the token's weights, 0 for tokens that cannot be used.
void pruning_greedy(const GreedyParams& p, int64_t b, const GreedyScratch& s, float* quality) {
  const int64_t begin = p.cu[b], n = p.cu[b + 1] - begin, padded = panels(n) * kPanel;
  const int64_t count = picks_of(p, b);
  const bool stored = n <= kStoredGram, maxmin = p.mode == GreedyMode::max_min;
  float largest = 0;
  for (int64_t i = 0; i < padded; ++i) {
    quality[i] = i < n && p.quality != nullptr ? p.quality[begin + i] : 1.0f;
    if (i < n && !(__builtin_fabsf(quality[i]) < __builtin_inff())) s.finite[i] = 0;
    if (i >= n || !s.finite[i]) quality[i] = 0;
  }
  int64_t seed = 0;
  const auto next_seed = [&]() -> int64_t {
    if (p.protected_tokens == nullptr) return -1;
    while (seed < n && !p.protected_tokens[begin + seed]) ++seed;
    return seed < n ? seed++ : -1;
  };
  int64_t pick = next_seed();
  if (maxmin && pick < 0) nearest_others(s, n, padded, p.channels, stored);
  for (int64_t i = 0; i < padded; ++i) {
    if (!maxmin) {
      // A unit row's similarity to itself is 1, not nearly 1.
      s.value[i] = is_zero(s, i, padded, p.channels, stored) ? 0.0f : quality[i] * quality[i];
      largest = s.value[i] > largest ? s.value[i] : largest;
    } else if (pick >= 0) {
      s.value[i] = __builtin_inff();
    }
    if (i < n && !s.finite[i]) s.value[i] = -__builtin_inff();
    if (i >= n) s.value[i] = __builtin_nanf("");
  }
  const float floor = 1e-6f * largest;
  if (!maxmin)
    for (int64_t i = 0; i < n; ++i)
      if (s.value[i] >= 0 && s.value[i] <= floor) s.value[i] = 0;
  int64_t steps = 0;
  for (int64_t step = 0; step < count; ++step) {
    if (pick < 0) pick = first_best(s.value, padded);
    if (maxmin) {
      if (step == 0)
        for (int64_t i = 0; i < n; ++i)
          if (s.finite[i]) s.value[i] = __builtin_inff();
      if (s.finite[pick]) update_nearest(s, similarity_row(s, pick, padded, p.channels, stored), padded);
    } else if (s.value[pick] > 0) {
      update_residual(s, similarity_row(s, pick, padded, p.channels, stored), quality, pick, steps++, padded, floor);
    }
    p.scores[begin + pick] = -static_cast<float>(step);
    s.value[pick] = __builtin_nanf("");
    pick = next_seed();
  }
}

}  // namespace fastxattn::FXA_ISA
