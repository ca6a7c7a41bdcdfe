#include "attention/attention_plan.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <memory>
#include <new>

namespace fastxattn {
namespace {

constexpr double kGrain = 1 << 20;         // multiply-adds worth handing to another thread
constexpr int64_t kFewLanes = 8;           // up to so many query rows per key/value head, streaming beats tiling
constexpr int64_t kFewSplitKeys = 512;     // fewest keys in a split of a streamed sequence
constexpr int64_t kFewCost = 8;            // a streamed row of keys costs as much as so many query rows
constexpr int64_t kUnitsPerSequence = 16;  // pieces below which a long sequence's keys are split
constexpr int64_t kSplitKeys = 1024;       // fewest keys in a split
constexpr int64_t kBackwardCuts = 8;       // pieces that keys, and query rows, are cut into at most, backward
constexpr int64_t kCutSize = 1024;         // fewest keys, or query rows, in such a piece

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

struct Free {
  void operator()(void* p) const { std::free(p); }
};

}  // namespace

void* thread_scratch(size_t bytes) {
  thread_local std::unique_ptr<void, Free> memory;
  thread_local size_t size = 0;
  if (bytes > size) {
    memory.reset();
    size = 0;
    const size_t rounded = (bytes + 63) / 64 * 64;
    memory.reset(std::aligned_alloc(64, rounded));
    if (!memory) throw std::bad_alloc();
    size = rounded;
  }
  return memory.get();
}

std::vector<TaskRange> make_tasks(const std::vector<double>& costs) {
  std::vector<TaskRange> tasks;
  std::vector<int> buckets;
  const int64_t n = static_cast<int64_t>(costs.size());
  for (int64_t i = 0; i < n;) {
    double cost = 0;
    const int64_t begin = i;
    while (i < n && (i == begin || cost + costs[i] <= kGrain)) cost += costs[i++];
    tasks.push_back({begin, i});
    buckets.push_back(std::ilogb(cost + 1));
  }
  if (tasks.size() <= 2) return tasks;
  std::vector<int64_t> order(tasks.size());
  for (size_t i = 0; i < order.size(); ++i) order[i] = static_cast<int64_t>(i);
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return buckets[a] > buckets[b]; });
  std::vector<TaskRange> sorted(tasks.size());
  for (size_t i = 0; i < order.size(); ++i) sorted[i] = tasks[order[i]];
  return sorted;
}

ForwardPlan plan_forward(const AttentionParams& p) {
  ForwardPlan plan;
  std::vector<double> costs;
  const double depth = static_cast<double>(p.head_dim + p.value_dim);
  for (int64_t b = 0; b < p.batch; ++b) {
    const Sequence s = sequence_of(p, b);
    const int64_t lanes = s.queries * p.group();
    if (lanes == 0) continue;
    const bool few = lanes <= kFewLanes;
    const int64_t chunks = ceil_div(lanes, kLaneChunk);
    const int64_t chunk = round_up(ceil_div(lanes, chunks), std::min(lanes, kLaneBlock));
    const int64_t target = few ? kMaxSplits : kUnitsPerSequence / (chunks * p.kv_heads);
    const int64_t splits =
        std::max<int64_t>(1, std::min({target, s.keys / (few ? kFewSplitKeys : kSplitKeys), kMaxSplits}));
    const int64_t keys = round_up(ceil_div(s.keys, splits), splits > 1 ? kKeyBlock : 1);
    const double head_cost = static_cast<double>(few ? kFewCost : round_up(std::min(chunk, lanes), 16)) * keys * depth;
    // Streaming wants whole rows of keys, all heads of them, as they lie in memory.
    const int64_t grouped = few ? std::min(p.kv_heads, kLaneBlock / lanes)
                                : std::clamp<int64_t>(static_cast<int64_t>(kGrain / (head_cost + 1)), 1, p.kv_heads);
    const int64_t stride = p.kv_heads * lanes * (p.value_dim + 2);
    if (splits > 1) plan.merges.push_back({b, splits, plan.workspace, stride});
    for (int64_t split = 0; split < splits; ++split) {
      const int64_t partial = splits > 1 ? plan.workspace + split * stride : -1;
      for (int64_t lane = 0; lane < lanes; lane += chunk) {
        for (int64_t head = 0; head < p.kv_heads; head += grouped) {
          const int64_t head_end = std::min(head + grouped, p.kv_heads);
          plan.items.push_back({b, head, head_end, lane, std::min(lane + chunk, lanes), std::min(split * keys, s.keys),
                                std::min((split + 1) * keys, s.keys), split, partial, few});
          costs.push_back(head_cost * static_cast<double>(head_end - head) + 1000);
        }
      }
    }
    if (splits > 1) plan.workspace += splits * stride;
  }
  plan.tasks = make_tasks(costs);
  return plan;
}

BackwardPlan plan_backward(const AttentionParams& p, const AttentionGradients& g, const AttentionContent& content) {
  BackwardPlan plan;
  std::vector<double> costs;
  const int64_t bias_heads = g.key_bias_has_heads ? p.heads : p.kv_heads;
  const double depth = 3.0 * static_cast<double>(p.head_dim) + 2.0 * static_cast<double>(p.value_dim);
  plan.delta.assign(static_cast<size_t>(p.batch), -1);
  for (int64_t b = 0; b < p.batch; ++b) {
    const Sequence s = sequence_of(p, b);
    const int64_t lanes = s.queries * p.group();
    if (lanes == 0 || s.keys == 0) {
      plan.queries_left_out |= lanes > 0;
      plan.keys_left_out |= s.keys > 0;
      continue;
    }
    const bool few = lanes <= kFewLanes;
    const int64_t together = few ? std::min(p.kv_heads, kLaneBlock / lanes) : 1;
    const int64_t target = ceil_div(kUnitsPerSequence, ceil_div(p.kv_heads, together));
    const int64_t lane_chunks = std::max<int64_t>(1, std::min({kBackwardCuts, target, lanes / kCutSize}));
    const int64_t key_chunks =
        std::max<int64_t>(1, std::min({kBackwardCuts, ceil_div(target, lane_chunks), s.keys / kCutSize}));
    const int64_t lane_chunk = round_up(ceil_div(lanes, lane_chunks), lane_chunks > 1 ? kLaneBlock : 1);
    const int64_t key_chunk = round_up(ceil_div(s.keys, key_chunks), key_chunks > 1 ? kKeyBlock : 1);

    BackwardMerge merge{b, key_chunks, lane_chunks, -1, 0, -1, 0, -1, 0};
    auto reserve = [&](bool needed, int64_t stride, int64_t count, int64_t& at, int64_t& step) {
      if (!needed) return;
      at = plan.workspace;
      step = stride;
      plan.workspace += stride * count;
    };
    reserve(g.grad_query && key_chunks > 1, p.kv_heads * lanes * p.head_dim, key_chunks, merge.query_partial,
            merge.query_stride);
    reserve((g.grad_key || g.grad_value) && (lane_chunks > 1 || content.repeated_keys),
            p.kv_heads * s.keys * (p.head_dim + p.value_dim), lane_chunks, merge.key_partial, merge.key_stride);
    reserve(g.grad_key_bias != nullptr, bias_heads * s.keys, lane_chunks, merge.key_bias_partial,
            merge.key_bias_stride);
    // The weights of so many keys are not held until delta is known; the bias's own pass asks for it too.
    const bool beforehand = key_chunks > 1 || s.keys > kHeldTiles * kKeyBlock || g.grad_bias;
    int64_t delta = -1, delta_stride = 0;
    reserve(p.dtype == DType::f32 && beforehand, 2 * p.kv_heads * lanes, key_chunks, delta, delta_stride);
    if (delta >= 0) plan.deltas.push_back({p.kv_heads * lanes, delta, delta_stride, key_chunks});
    plan.delta[static_cast<size_t>(b)] = delta;
    if (merge.query_partial >= 0 || merge.key_partial >= 0 || merge.key_bias_partial >= 0) plan.merges.push_back(merge);

    const double head_cost = static_cast<double>(few ? kFewCost : round_up(std::min(lane_chunk, lanes), 16)) *
                             static_cast<double>(std::min(key_chunk, s.keys)) * depth;
    const int64_t grouped =
        few ? together : std::clamp<int64_t>(static_cast<int64_t>(kGrain / (head_cost + 1)), 1, p.kv_heads);
    auto part = [](int64_t base, int64_t stride, int64_t i) { return base < 0 ? -1 : base + stride * i; };
    for (int64_t ki = 0; ki < key_chunks; ++ki) {
      for (int64_t qi = 0; qi < lane_chunks; ++qi) {
        for (int64_t head = 0; head < p.kv_heads; head += grouped) {
          const int64_t head_end = std::min(head + grouped, p.kv_heads);
          plan.items.push_back(
              {b, head, head_end, std::min(qi * lane_chunk, lanes), std::min((qi + 1) * lane_chunk, lanes),
               std::min(ki * key_chunk, s.keys), std::min((ki + 1) * key_chunk, s.keys),
               part(merge.query_partial, merge.query_stride, ki), part(merge.key_partial, merge.key_stride, qi),
               part(merge.key_bias_partial, merge.key_bias_stride, qi), delta, part(delta, delta_stride, ki), few});
          costs.push_back(head_cost * static_cast<double>(head_end - head) + 2000);
        }
      }
    }
  }
  plan.tasks = make_tasks(costs);
  return plan;
}

std::vector<BiasItem> plan_bias(const AttentionParams& p) {
  std::vector<BiasItem> items;
  const int64_t batch_step = p.bias_size[0] > 1 ? 1 : std::max<int64_t>(p.batch, 1);
  const int64_t head_step = p.bias_size[1] > 1 ? 1 : p.kv_heads;
  const int64_t place_step = p.bias_size[2] > 1 ? kBackwardLanes / 2 : std::max<int64_t>(p.rows_q, 1);
  const int64_t places = p.bias_size[2] > 1 ? p.bias_size[2] : place_step;
  for (int64_t b = 0; b < p.batch; b += batch_step) {
    for (int64_t head = 0; head < p.kv_heads; head += head_step) {
      for (int64_t place = 0; place < places; place += place_step) {
        items.push_back({b, b + batch_step, head, head + head_step, place, std::min(place + place_step, places)});
      }
    }
  }
  return items;
}

}  // namespace fastxattn
