#include "attention/attention_plan.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <memory>
#include <new>

namespace fastxattn {
namespace {

constexpr double kGrain = 1 << 19;        // multiply-adds worth handing to another thread
constexpr int64_t kFewLanes = 4;          // up to so many query rows per key/value head, streaming beats tiling
constexpr int64_t kUnitsPerSequence = 16; // pieces below which a long sequence's keys are split
constexpr int64_t kSplitKeys = 1024;      // fewest keys in a split

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
    const int64_t wanted = few ? kMaxSplits : kUnitsPerSequence / (chunks * p.kv_heads);
    const int64_t splits = std::max<int64_t>(1, std::min({wanted, s.keys / kSplitKeys, kMaxSplits}));
    const int64_t keys = round_up(ceil_div(s.keys, splits), splits > 1 ? kKeyBlock : 1);
    const double head_cost = static_cast<double>(few ? lanes : round_up(std::min(chunk, lanes), 16)) * keys * depth;
    const int64_t grouped = std::clamp<int64_t>(static_cast<int64_t>(kGrain / (head_cost + 1)), 1, p.kv_heads);
    const int64_t stride = p.kv_heads * lanes * (p.value_dim + 1);
    if (splits > 1) plan.merges.push_back({b, splits, plan.workspace, stride});
    for (int64_t split = 0; split < splits; ++split) {
      const int64_t partial = splits > 1 ? plan.workspace + split * stride : -1;
      for (int64_t lane = 0; lane < lanes; lane += chunk) {
        for (int64_t head = 0; head < p.kv_heads; head += grouped) {
          const int64_t head_end = std::min(head + grouped, p.kv_heads);
          plan.items.push_back({b, head, head_end, lane, std::min(lane + chunk, lanes),
                                std::min(split * keys, s.keys), std::min((split + 1) * keys, s.keys), split, partial,
                                few});
          costs.push_back(head_cost * static_cast<double>(head_end - head) + 1000);
        }
      }
    }
    if (splits > 1) plan.workspace += splits * stride;
  }
  plan.tasks = make_tasks(costs);
  return plan;
}

}  // namespace fastxattn
