#include <algorithm>
#include <vector>

#include "attention/attention_plan.h"
#include "importance/importance.h"

namespace fastxattn {

FXA_CPU_KERNEL(size_t, importance_scratch, (const AttentionParams&, int64_t))
FXA_CPU_KERNEL(void, importance_of_keys, (const ImportanceParams&, const ImportanceItem&, int64_t, void*))

namespace {

constexpr int64_t kPanelBytes = 128 << 10;  // packed keys of one item: they stay in the second-level cache
constexpr int64_t kShortKeys = 192;         // keys of an item when its queries are one block: several heads follow
constexpr int64_t kFewRows = 4;             // up to so many query rows, streaming beats tiling
constexpr int64_t kStreamedKeys = 256;      // keys of a streamed item
constexpr double kItemWork = 4 << 20;       // multiply-adds of an item of several heads

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Cuts by each sequence and the head counts only, as attention's plan does.
std::vector<ImportanceItem> plan(const AttentionParams& p, int64_t most_keys) {
  std::vector<ImportanceItem> items;
  for (int64_t b = 0; b < p.batch; ++b) {
    const Sequence s = sequence_of(p, b);
    if (s.queries == 0 || s.keys == 0) continue;
    const int64_t lanes = s.queries * p.group();
    const bool few = s.queries <= kFewRows && lanes <= kLaneBlock;
    const int64_t target = few ? kStreamedKeys : s.queries <= kLaneBlock ? kShortKeys : most_keys;
    const int64_t cuts = ceil_div(s.keys, std::min(target, most_keys));
    const int64_t keys = std::min(ceil_div(ceil_div(s.keys, cuts), 16) * 16, most_keys);
    const double head_work = static_cast<double>(ceil_div(lanes, 16) * 16 * keys * p.head_dim);
    // Few rows want whole rows of keys, all heads of them; tiles, several heads, so that one can be asked for in time.
    const int64_t heads = few ? kLaneBlock / lanes : std::max<int64_t>(1, static_cast<int64_t>(kItemWork / head_work));
    for (int64_t k = 0; k < s.keys; k += keys) {
      for (int64_t head = 0; head < p.kv_heads; head += heads) {
        items.push_back({b, head, std::min(head + heads, p.kv_heads), k, std::min(k + keys, s.keys), few});
      }
    }
  }
  return items;
}

}  // namespace

void key_importance(const ImportanceParams& params, const Parallel& parallel, Isa isa) {
  const AttentionParams& p = params.attention;
  zero_bytes(params.score, p.heads * p.slots_k * 4);
  const int64_t most_keys = kPanelBytes / (p.head_dim * 4) / 48 * 48 + 48;
  const std::vector<ImportanceItem> items = plan(p, most_keys);
  const size_t bytes = importance_scratch_for(isa)(p, most_keys);
  const auto run = importance_of_keys_for(isa);
  for_each_task(parallel, static_cast<int64_t>(items.size()), [&](int64_t task, int64_t) {
    run(params, items[static_cast<size_t>(task)], most_keys, thread_scratch(bytes));
  });
}

}  // namespace fastxattn
