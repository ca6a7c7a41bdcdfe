// The sigmoid loss of one block: each pair is a yes-or-no question of its own, so loss and gradients take one pass.
#pragma once

#include "contrastive/contrastive_block.inl"

namespace fastxattn::FXA_ISA {

// log(1 + e) for e in [0, 1], by the series of 2 atanh(e / (2 + e)): relative error <= 2e-7.
FXA_INLINE vf log1p_unit(vf e) {
  const vf t = e / (splat(2.0f) + e), q = t * t;
  vf y = splat(2.0f / 15.0f);
  y = fma(y, q, splat(2.0f / 13.0f));
  y = fma(y, q, splat(2.0f / 11.0f));
  y = fma(y, q, splat(2.0f / 9.0f));
  y = fma(y, q, splat(2.0f / 7.0f));
  y = fma(y, q, splat(2.0f / 5.0f));
  y = fma(y, q, splat(2.0f / 3.0f));
  y = fma(y, q, splat(2.0f));
  return t * y;
}

void sigmoid_block(const ContrastiveParams& p, int64_t row_block, int64_t column_block, char* scratch) {
  Block k = make_block(p, row_block, column_block, scratch);
  const Operands op = block_product(p, k);
  const Columns& c = *k.columns_info;
  const int64_t lanes = round_up(k.columns, W);
  const bool gradients = p.a.grad_data || p.b.grad_data || p.a.dot;
  float* energy = k.halves;
  for (int64_t j = 0; j < lanes; ++j) energy[j] = 0.0f;
  bool low_a = false, low_b = false;
  for (int64_t r = 0; r < k.rows; ++r) {
    const int64_t i = k.i0 + r;
    float* tile = k.tile + r * kMaxBlock;
    const vf norm = splat(p.a.norm ? p.a.norm[i] : 1.0f), scale = splat(p.scale), bias = splat(p.bias);
    const vf weight = splat(p.a.weight ? p.a.weight[i] : 1.0f);
    vf loss = zero(), dot = zero(), sum = zero(), row_energy = zero();
    for (int64_t j = 0; j < lanes; j += W) {
      const vf factor = load(c.norm + j), cosine = load(tile + j) * factor * norm;
      vi live = ~load_bits(c.dead + j);
      if (p.exclude_self) live &= load_bits(c.index + j) != splat(static_cast<int32_t>(i));
      const vi positive = live & (load_bits(c.id + j) == splat(p.a.id[i]));
      if (p.a.skip) live &= positive | (load_bits(c.skip + j) != splat(p.a.skip[i]));
      // A question answered wrongly with margin x costs log(1 + exp(x)); a positive's margin is the negated logit.
      vf x = fma(cosine, scale, bias);
      if (p.exact && any(positive)) x = positive ? splat(p.exact[i]) : x;
      x = positive ? -x : x;
      const vf e = exp(x > zero() ? -x : x);  // NaN stays NaN
      loss += live ? (x > zero() ? x : zero()) + log1p_unit(e) : zero();
      if (!gradients) continue;
      const vf share = splat(1.0f) / (splat(1.0f) + e);
      const vf chance = x > zero() ? share : e * share;
      const vf dz = live ? (positive ? -chance : chance) * weight : zero();
      dot += live ? dz * cosine : zero();
      sum += dz;
      row_energy = fma(dz, dz, row_energy);
      store(energy + j, fma(dz, dz, load(energy + j)));
      store(tile + j, dz * (norm * factor * scale));
    }
    p.loss[i] += reduce_add(loss);
    if (!gradients) continue;
    p.a.dot[i] += reduce_add(dot);
    p.row_dz[i] += reduce_add(sum);
    low_a |= rounding_shows(reduce_add(row_energy), p.a.scale_of ? p.a.scale_of[i] : 0.0f, k.columns, p.b.count);
  }
  if (!gradients) return;
  for (int64_t j = 0; j < k.columns; ++j) {
    low_b |= rounding_shows(energy[j], p.b.scale_of ? p.b.scale_of[k.j0 + j] : 0.0f, k.rows, p.a.count);
  }
  block_gradients(p, k, op, low_a, low_b);
}

}  // namespace fastxattn::FXA_ISA
