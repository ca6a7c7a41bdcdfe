// Schedules blocks over threads, and turns running statistics into finished ones.
#include <algorithm>
#include <cmath>
#include <limits>

#include "contrastive/contrastive.h"
#include "core/cpu/isa.h"
#include "core/cpu/parallel.h"

namespace fastxattn {

FXA_CPU_KERNEL(void, contrastive_stats_block, (const ContrastiveParams&, int64_t, int64_t, char*))
FXA_CPU_KERNEL(void, contrastive_backward_block, (const ContrastiveParams&, int64_t, int64_t, char*))
FXA_CPU_KERNEL(void, sigmoid_block, (const ContrastiveParams&, int64_t, int64_t, char*))
FXA_CPU_KERNEL(void, contrastive_positive_block, (const ContrastiveParams&, const int32_t*, int64_t, float*, char*))

namespace {

using BlockFunction = void (*)(const ContrastiveParams&, int64_t, int64_t, char*);

int64_t blocks(const ContrastiveSide& side) { return (side.count + side.block - 1) / side.block; }

// Phase f runs the blocks (r, (r + f) mod longest): no two of them share a row or a column block, and every block
// meets its rows and columns in the same order whatever the number of threads.
void run_blocks(const ContrastiveParams& p, char* scratch, const Parallel& parallel, BlockFunction function) {
  if (p.a.count == 0 || p.b.count == 0) return;
  const int64_t rows = blocks(p.a), columns = blocks(p.b), longest = std::max(rows, columns);
  const int64_t bytes = contrastive_scratch(p);
  for (int64_t phase = 0; phase < longest; ++phase) {
    for_each_task(parallel, std::min(rows, columns), [&](int64_t task, int64_t worker) {
      const int64_t row = rows <= columns ? task : (task + phase) % longest;
      const int64_t column = rows <= columns ? (task + phase) % longest : task;
      function(p, row, column, scratch + worker * bytes);
    });
  }
}

constexpr float kInfinity = std::numeric_limits<float>::infinity();

void start(const ContrastiveSide& side) {
  for (int plane = 0; plane < kStatePlanes; ++plane) {
    const float first = plane == kMaxNeg || plane == kMaxPos ? -kInfinity : 0.0f;
    std::fill_n(side.state + plane * side.count, side.count, first);
  }
}

void finish(const ContrastiveSide& side, float* stats) {
  const int64_t n = side.count;
  const auto state = [&](int plane, int64_t i) { return side.state[plane * n + i]; };
  for (int64_t i = 0; i < n; ++i) {
    const float negatives = state(kCountNeg, i), positives = state(kCountPos, i);
    // NaN is not greater than zero and must survive; only an exact zero means that there was nothing.
    const float exp_neg = state(kExpNeg, i), exp_pos = state(kExpPos, i);
    stats[kLseNeg * n + i] = exp_neg == 0 ? -kInfinity : state(kMaxNeg, i) + std::log(exp_neg);
    stats[kMeanNeg * n + i] = negatives > 0 ? state(kSumNeg, i) / negatives : 0.0f;
    const float mean = positives > 0 ? state(kSumPos, i) / positives : 0.0f;
    stats[kMeanPos * n + i] = mean;
    const float excess = state(kMaxPos, i) - mean + std::log(exp_pos);
    stats[kExcessPos * n + i] = positives > 1 ? (excess < 0 ? 0.0f : excess) : 0.0f;
    stats[kNumNeg * n + i] = negatives;
    stats[kNumPos * n + i] = positives;
    stats[kAhead * n + i] = state(kRank, i);
  }
}

template <class T>
double dot(const void* a, const void* b, int64_t d) {
  const T *x = static_cast<const T*>(a), *y = static_cast<const T*>(b);
  double lanes[8] = {};
  int64_t k = 0;
  for (; k + 8 <= d; k += 8)
    for (int l = 0; l < 8; ++l) lanes[l] += static_cast<double>(to_f32(x[k + l])) * to_f32(y[k + l]);
  for (; k < d; ++k) lanes[0] += static_cast<double>(to_f32(x[k])) * to_f32(y[k]);
  return (lanes[0] + lanes[1]) + (lanes[2] + lanes[3]) + ((lanes[4] + lanes[5]) + (lanes[6] + lanes[7]));
}

}  // namespace

int64_t contrastive_scratch(const ContrastiveParams& p) {
  // As make_block carves it: column facts, two panel copies, the strips, the tile, bf16 parts (or row coefficients).
  const int64_t depth = (p.d + 31) / 32 * 32;
  const int64_t bytes = 4 * kMaxBlock * 8 + 4 * (3 * kMaxBlock * depth + 2 * kMaxBlock * kMaxBlock + 64 * kMaxBlock);
  return (bytes + 4095) / 4096 * 4096;
}

void contrastive_forward(const ContrastiveParams& p, float* row_stats, float* col_stats, char* scratch,
                         const Parallel& parallel) {
  start(p.a);
  start(p.b);
  run_blocks(p, scratch, parallel, contrastive_stats_block_for(active_isa()));
  finish(p.a, row_stats);
  finish(p.b, col_stats);
}

void contrastive_backward(const ContrastiveParams& p, char* scratch, const Parallel& parallel) {
  run_blocks(p, scratch, parallel, contrastive_backward_block_for(active_isa()));
}

void sigmoid_forward(const ContrastiveParams& p, char* scratch, const Parallel& parallel) {
  run_blocks(p, scratch, parallel, sigmoid_block_for(active_isa()));
}

void positive_logits(const ContrastiveParams& p, const int32_t* target, float* exact, const Parallel& parallel) {
  constexpr int64_t kChunk = 256;
  const int64_t size = dtype_size(p.dtype);
  for_each_task(parallel, (p.a.count + kChunk - 1) / kChunk, [&](int64_t task, int64_t) {
    for (int64_t i = task * kChunk; i < std::min(p.a.count, (task + 1) * kChunk); ++i) {
      exact[i] = 0.0f;
      const int64_t j = target[i];
      if (j < 0) continue;
      const void* a = static_cast<const char*>(p.a.data) + i * p.a.stride * size;
      const void* b = static_cast<const char*>(p.b.data) + j * p.b.stride * size;
      const double product = p.dtype == DType::f32    ? dot<float>(a, b, p.d)
                             : p.dtype == DType::bf16 ? dot<bf16_t>(a, b, p.d)
                                                      : dot<f16_t>(a, b, p.d);
      const double norms = (p.a.norm ? p.a.norm[i] : 1.0) * (p.b.norm ? p.b.norm[j] : 1.0);
      exact[i] = static_cast<float>(product * norms * p.scale + p.bias);
    }
  });
}

void positive_logits_as_blocked(const ContrastiveParams& p, const int32_t* target, float* out, char* scratch,
                                const Parallel& parallel) {
  const auto function = contrastive_positive_block_for(active_isa());
  const int64_t bytes = contrastive_scratch(p);
  for_each_task(parallel, (p.a.count + 63) / 64,
                [&](int64_t task, int64_t worker) { function(p, target, task, out, scratch + worker * bytes); });
}

}  // namespace fastxattn
