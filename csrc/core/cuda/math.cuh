// Exponentials, logarithms and quotients to a few units of the last place, of approximate instructions and corrections.
#pragma once

#include <cmath>

#include "core/cuda/device.h"

namespace fastxattn::gpu {

// exp(x) for x <= 0 (or NaN) within a few units of the last place: exp2 of the rounded product, times what it lost.
FXA_DEVICE float exponential(float x) {
  if (x < -104.0f) return 0.0f;
  const float t = x * 1.44269502f;
  const float lost = fused(x, 1.44269502f, -t) + x * 1.92596299e-8f;
  return fast_exp2(t) * fused(lost, 0.693147182f, 1.0f);
}

// a / b within a unit of the last place, for b that is neither tiny nor huge.
FXA_DEVICE float ratio(float a, float b) {
  const float inverse = fast_reciprocal(b), first = a * inverse;
  return fused(fused(-first, b, a), inverse, first);
}

// log(1 + e) for e in [0, 1], by the series of 2 atanh(e / (2 + e)): relative error <= 2e-7.
FXA_DEVICE float log1p_unit(float e) {
  const float t = ratio(e, e + 2.0f), q = t * t;
  float y = fused(q, 2.0f / 15.0f, 2.0f / 13.0f);
  y = fused(y, q, 2.0f / 11.0f);
  y = fused(y, q, 2.0f / 9.0f);
  y = fused(y, q, 2.0f / 7.0f);
  y = fused(y, q, 2.0f / 5.0f);
  y = fused(y, q, 2.0f / 3.0f);
  y = fused(y, q, 2.0f);
  return t * y;
}

// Running maximum and sum of exponentials around it; those of differences divided by a temperature, where there is one.
struct LogSum {
  float top = -INFINITY, exps = 0.0f;

  // NaN never becomes the maximum, but the sum from then on.
  FXA_DEVICE void add(float other_top, float other_exps, float inverse_temperature = 1.0f) {
    const bool raised = other_top > top;
    const float gap = raised ? top - other_top : other_top - top;
    const float factor = other_top == top ? 1.0f : exponential(gap * inverse_temperature);
    exps = raised ? fused(exps, factor, other_exps) : fused(other_exps, factor, exps);
    top = raised ? other_top : top;
  }
};

}  // namespace fastxattn::gpu
