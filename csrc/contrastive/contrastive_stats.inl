// Log-sum-exp statistics of one block (forward), and the gradients through them (backward).
//
// Negatives are summed around a running maximum. Positives are kept out of those sums: their logits have
// statistics of their own, so that a converged batch, whose negatives weigh 1e-8 beside its positive, loses nothing.
#pragma once

#include "contrastive/contrastive_block.inl"

namespace fastxattn::FXA_ISA {

// exp(x - top) where `mask`, else 0; an empty `top` of -inf never reaches the exponential's result.
FXA_INLINE vf masked_exp(vi mask, vf x, vf top) { return mask ? exp(x - top) : zero(); }

// Adds the lanes in `mask` to running (max, sum of exponentials, sum, count), lane by lane.
FXA_INLINE void add_lanes(vi mask, vf x, float* top, float* exps, float* sum, float* count) {
  const vf old = load(top), candidate = mask ? x : splat(minus_infinity());
  const vf now = max(candidate, old);
  const vf kept = load(exps) * exp(old - now);
  const vi some = now > splat(minus_infinity());
  store(exps, (some ? kept : zero()) + masked_exp(mask, x, now));
  store(top, now);
  store(sum, load(sum) + (mask ? x : zero()));
  store(count, load(count) + (mask ? splat(1.0f) : zero()));
}

FXA_INLINE void add_lanes_to_row(vf top, vf exps, vf sum, vf count, float* const* plane, int64_t i, int max_plane,
                                 int exp_plane, int sum_plane, int count_plane) {
  const float block_top = reduce_max(top), old = plane[max_plane][i];
  const float now = block_top > old ? block_top : old;
  // -inf lanes hold exponentials of 0; where everything is -inf there is nothing to add.
  float total = 0;
  if (now > minus_infinity()) {
    const vi some = top > splat(minus_infinity());
    total = reduce_add(some ? exps * exp(top - splat(now)) : exps) + plane[exp_plane][i] * exp(splat(old - now))[0];
  } else {
    total = plane[exp_plane][i] + reduce_add(exps);
  }
  plane[max_plane][i] = now;
  plane[exp_plane][i] = total;
  plane[sum_plane][i] += reduce_add(sum);
  plane[count_plane][i] += reduce_add(count);
}

// The pair's classes: which lanes are positives, and which are negatives before the limits of a direction.
struct Classes {
  vi positive, negative;
};
template <bool Filter>
FXA_INLINE Classes classify(const ContrastiveParams& p, const Columns& c, int64_t i, int64_t j) {
  vi dead = load_bits(c.dead + j);
  if constexpr (Filter) {
    if (p.exclude_self) dead |= load_bits(c.index + j) == splat(static_cast<int32_t>(i));
  }
  const vi positive = (load_bits(c.id + j) == splat(p.a.id[i])) & ~dead;
  vi negative = ~(positive | dead);
  if constexpr (Filter) {
    if (p.a.skip) negative &= load_bits(c.skip + j) != splat(p.a.skip[i]);
  }
  return {positive, negative};
}

template <bool Filter, bool Means>
static void stats_tile(const ContrastiveParams& p, Block& k) {
  const Columns& c = *k.columns_info;
  const int64_t lanes = round_up(k.columns, W);
  float *rows[kStatePlanes], *columns[kStatePlanes];
  for (int s = 0; s < kStatePlanes; ++s) {
    rows[s] = p.a.state + s * p.a.count + k.i0;
    columns[s] = k.halves + s * kMaxBlock;  // copied back below
    for (int64_t j = 0; j < lanes; ++j) {
      columns[s][j] = j < k.columns                  ? p.b.state[s * p.b.count + k.j0 + j]
                      : s == kMaxNeg || s == kMaxPos ? minus_infinity()
                                                     : 0.0f;
    }
  }
  float* row_top = k.halves + kStatePlanes * kMaxBlock;
  float* old_top = row_top + kMaxBlock;
  for (int64_t j = 0; j < lanes; j += W) store(old_top + j, load(columns[kMaxNeg] + j));
  const vf floor = splat(minus_infinity());

  // First sweep: logits, maxima, and everything about positives.
  for (int64_t r = 0; r < k.rows; ++r) {
    const int64_t i = k.i0 + r;
    float* tile = k.tile + r * kMaxBlock;
    const vf factor = splat(p.scale * (p.a.norm ? p.a.norm[i] : 1.0f)), bias = splat(p.bias);
    const vf limit = splat(Filter && p.a.limit ? p.a.limit[i] : __builtin_inff());
    vf top = floor, sum = zero(), count = zero(), ahead = zero();
    vi some_positive = {};
    for (int64_t j = 0; j < lanes; j += W) {
      const vf x = fma(load(tile + j) * load(c.norm + j), factor, bias);
      store(tile + j, x);
      const Classes is = classify<Filter>(p, c, i, j);
      some_positive |= is.positive;
      const vi in_row = Filter ? is.negative & ~(x > limit) : is.negative;
      const vi in_column = Filter ? is.negative & ~(x > load(c.limit + j)) : is.negative;
      top = max(in_row ? x : floor, top);
      store(columns[kMaxNeg] + j, max(in_column ? x : floor, load(columns[kMaxNeg] + j)));
      if constexpr (Means) {
        const vf one = splat(1.0f);
        sum += in_row ? x : zero();
        count += in_row ? one : zero();
        store(columns[kSumNeg] + j, load(columns[kSumNeg] + j) + (in_column ? x : zero()));
        store(columns[kCountNeg] + j, load(columns[kCountNeg] + j) + (in_column ? one : zero()));
        if (p.a.rank_at) ahead += in_row & (x >= splat(p.a.rank_at[i])) ? one : zero();
        if (p.b.rank_at) {
          const vf reached = in_column & (x >= load(c.rank_at + j)) ? one : zero();
          store(columns[kRank] + j, load(columns[kRank] + j) + reached);
        }
      }
    }
    row_top[r] = reduce_max(top) > rows[kMaxNeg][r] ? reduce_max(top) : rows[kMaxNeg][r];
    if constexpr (Means) {
      rows[kSumNeg][r] += reduce_add(sum);
      rows[kCountNeg][r] += reduce_add(count);
      rows[kRank][r] += reduce_add(ahead);
    }
    if (!any(some_positive)) continue;
    float at[4][W];
    store(at[0], floor), store(at[1], zero()), store(at[2], zero()), store(at[3], zero());
    for (int64_t j = 0; j < lanes; j += W) {
      const vi positive = classify<Filter>(p, c, i, j).positive;
      if (!any(positive)) continue;
      const vf x = p.exact ? splat(p.exact[i]) : load(tile + j);
      add_lanes(positive, x, at[0], at[1], at[2], at[3]);
      add_lanes(positive, x, columns[kMaxPos] + j, columns[kExpPos] + j, columns[kSumPos] + j, columns[kCountPos] + j);
    }
    add_lanes_to_row(load(at[0]), load(at[1]), load(at[2]), load(at[3]), rows, r, kMaxPos, kExpPos, kSumPos, kCountPos);
  }

  // Second sweep: exponentials around the new maxima.
  for (int64_t j = 0; j < lanes; j += W) {
    const vf now = load(columns[kMaxNeg] + j), kept = load(columns[kExpNeg] + j) * exp(load(old_top + j) - now);
    store(columns[kExpNeg] + j, now > floor ? kept : load(columns[kExpNeg] + j));
  }
  for (int64_t r = 0; r < k.rows; ++r) {
    const int64_t i = k.i0 + r;
    const float* tile = k.tile + r * kMaxBlock;
    const vf limit = splat(Filter && p.a.limit ? p.a.limit[i] : __builtin_inff());
    const vf top = splat(row_top[r]);
    vf sum = zero();
    for (int64_t j = 0; j < lanes; j += W) {
      const vf x = load(tile + j);
      const vi negative = classify<Filter>(p, c, i, j).negative;
      if (p.a.active) sum += masked_exp(Filter ? negative & ~(x > limit) : negative, x, top);
      if (p.b.active) {
        const vi in_column = Filter ? negative & ~(x > load(c.limit + j)) : negative;
        store(columns[kExpNeg] + j, load(columns[kExpNeg] + j) + masked_exp(in_column, x, load(columns[kMaxNeg] + j)));
      }
    }
    const float old = rows[kMaxNeg][r], kept = rows[kExpNeg][r];
    rows[kExpNeg][r] =
        reduce_add(sum) + (row_top[r] > minus_infinity() ? kept * exp(splat(old - row_top[r]))[0] : kept);
    rows[kMaxNeg][r] = row_top[r];
  }
  for (int s = 0; s < kStatePlanes; ++s) {
    for (int64_t j = 0; j < k.columns; ++j) p.b.state[s * p.b.count + k.j0 + j] = columns[s][j];
  }
}

static bool filters(const ContrastiveParams& p) {
  return p.exclude_self || p.a.skip != nullptr || p.a.limit != nullptr || p.b.limit != nullptr;
}

void contrastive_stats_block(const ContrastiveParams& p, int64_t row_block, int64_t column_block, char* scratch) {
  Block k = make_block(p, row_block, column_block, scratch);
  block_product(p, k);
  const bool filter = filters(p);
  if (filter && p.means) return stats_tile<true, true>(p, k);
  if (filter) return stats_tile<true, false>(p, k);
  if (p.means) return stats_tile<false, true>(p, k);
  stats_tile<false, false>(p, k);
}

// What a direction's statistics contribute to dz: gradients of lse_neg, mean_neg / count, mean_pos / count, excess.
struct Slopes {
  const float *lse, *mean_pos, *excess, *number;  // statistics
  const float *g_lse, *g_mean_neg, *g_mean_pos, *g_excess, *number_neg;
};
static Slopes slopes(const ContrastiveSide& s, int64_t first) {
  const auto stat = [&](int plane) { return s.stats + plane * s.count + first; };
  const auto grad = [&](int plane) { return s.grad + plane * s.count + first; };
  return {stat(kLseNeg),  stat(kMeanPos), stat(kExcessPos), stat(kNumPos), grad(kLseNeg),
          grad(kMeanNeg), grad(kMeanPos), grad(kExcessPos), stat(kNumNeg)};
}

// dz of a positive: its share of mean_pos, and of the excess; with one positive the latter is exactly zero.
FXA_INLINE vf positive_slope(vf x, vf lse, vf number, vf g_mean, vf g_excess) {
  const vf share = splat(1.0f) / number;
  return fma(g_excess, exp(x - lse) - share, g_mean * share);
}

template <bool Filter>
static void backward_tile(const ContrastiveParams& p, Block& k, bool* low_a, bool* low_b) {
  const Columns& c = *k.columns_info;
  const int64_t lanes = round_up(k.columns, W);
  // Column coefficients, padded with what makes dead lanes harmless.
  float* col[9];
  for (int s = 0; s < 9; ++s) col[s] = k.halves + s * kMaxBlock;
  float *lse = col[0], *g_lse = col[1], *g_mean = col[2], *lse_pos = col[3], *number = col[4], *g_pos = col[5];
  float *g_excess = col[6], *energy = col[7], *coefficient = col[8];
  for (int64_t j = 0; j < lanes; ++j) {
    const bool live = p.b.active && j < k.columns;
    const Slopes s = live ? slopes(p.b, k.j0) : Slopes{};
    lse[j] = live ? s.lse[j] : 0.0f;
    g_lse[j] = live ? s.g_lse[j] : 0.0f;
    g_mean[j] = live && s.number_neg[j] > 0 ? s.g_mean_neg[j] / s.number_neg[j] : 0.0f;
    lse_pos[j] = live ? s.mean_pos[j] + s.excess[j] : 0.0f;
    number[j] = live && s.number[j] > 0 ? s.number[j] : 1.0f;
    g_pos[j] = live ? s.g_mean_pos[j] : 0.0f;
    g_excess[j] = live ? s.g_excess[j] : 0.0f;
    energy[j] = 0.0f;
    coefficient[j] = live ? g_lse[j] : 0.0f;
  }
  for (int64_t r = 0; r < k.rows; ++r) {
    const int64_t i = k.i0 + r;
    float* tile = k.tile + r * kMaxBlock;
    const Slopes s = p.a.active ? slopes(p.a, i) : Slopes{};
    const vf row_lse = splat(p.a.active ? *s.lse : 0.0f), row_g = splat(p.a.active ? *s.g_lse : 0.0f);
    const vf row_mean = splat(p.a.active && *s.number_neg > 0 ? *s.g_mean_neg / *s.number_neg : 0.0f);
    const vf limit = splat(Filter && p.a.limit ? p.a.limit[i] : __builtin_inff());
    const vf norm = splat(p.a.norm ? p.a.norm[i] : 1.0f), scale = splat(p.scale), bias = splat(p.bias);
    vf dot = zero(), row_energy = zero();
    for (int64_t j = 0; j < lanes; j += W) {
      const vf factor = load(c.norm + j), product = load(tile + j) * factor;
      const vf x = fma(product, scale * norm, bias);
      const Classes is = classify<Filter>(p, c, i, j);
      const vi in_row = Filter ? is.negative & ~(x > limit) : is.negative;
      const vi in_column = Filter ? is.negative & ~(x > load(c.limit + j)) : is.negative;
      vf dz = zero();
      if (p.a.active) dz = in_row ? fma(row_g, exp(x - row_lse), row_mean) : zero();
      if (p.b.active) {
        dz += in_column ? fma(load(g_lse + j), exp(x - load(lse + j)), load(g_mean + j)) : zero();
      }
      if (any(is.positive)) {
        const vf xp = p.exact ? splat(p.exact[i]) : x;
        vf positive = zero();
        if (p.a.active) {
          positive = positive_slope(xp, splat(*s.mean_pos + *s.excess), splat(*s.number), splat(*s.g_mean_pos),
                                    splat(*s.g_excess));
        }
        if (p.b.active) {
          positive += positive_slope(xp, load(lse_pos + j), load(number + j), load(g_pos + j), load(g_excess + j));
        }
        dz = is.positive ? positive : dz;
      }
      const vf cosine = product * norm;
      // A dz of zero times an infinite logit is nothing, not NaN, where the pair takes no part.
      dot += is.positive | is.negative ? dz * cosine : zero();
      row_energy = fma(dz, dz, row_energy);
      store(energy + j, fma(dz, dz, load(energy + j)));
      store(tile + j, dz * (norm * factor * scale));
    }
    if (p.a.dot) p.a.dot[i] += reduce_add(dot);
    *low_a |= rounding_shows(reduce_add(row_energy), p.a.active ? *s.g_lse : 0.0f, k.columns, p.b.count);
  }
  for (int64_t j = 0; j < k.columns; ++j) *low_b |= rounding_shows(energy[j], coefficient[j], k.rows, p.a.count);
}

void contrastive_backward_block(const ContrastiveParams& p, int64_t row_block, int64_t column_block, char* scratch) {
  Block k = make_block(p, row_block, column_block, scratch);
  const Operands op = block_product(p, k);
  bool low_a = false, low_b = false;
  if (filters(p)) {
    backward_tile<true>(p, k, &low_a, &low_b);
  } else {
    backward_tile<false>(p, k, &low_a, &low_b);
  }
  block_gradients(p, k, op, low_a, low_b);
}

// The products of rows [first, first + count) with their targets as the block product rounds them: gathered columns,
// packed and multiplied in the same way; only the diagonal is kept.
void contrastive_positive_block(const ContrastiveParams& p, const int32_t* target, int64_t block, float* out,
                                char* scratch) {
  ContrastiveParams one = p;
  for (int64_t i = block * kStrip; i < p.a.count && i < (block + 1) * kStrip; ++i) {
    if (target[i] < 0) {
      out[i] = __builtin_inff();
      continue;
    }
    one.a.data = static_cast<const char*>(p.a.data) + i * p.a.stride * dtype_size(p.dtype);
    one.b.data = static_cast<const char*>(p.b.data) + target[i] * p.b.stride * dtype_size(p.dtype);
    one.a.count = one.b.count = 1;
    Block k = make_block(one, 0, 0, scratch);
    block_product(one, k);
    const float product = k.tile[0] * (p.b.norm ? p.b.norm[target[i]] : 1.0f);
    out[i] = fma(splat(product), splat(p.scale * (p.a.norm ? p.a.norm[i] : 1.0f)), splat(p.bias))[0];
  }
}

}  // namespace fastxattn::FXA_ISA
