#include <cstring>
#include <vector>

#include "attention/attention_plan.h"
#include "importance/importance.h"

FXA_DECLARE(size_t, importance_scratch, (const fastxattn::AttentionParams&, int64_t))
FXA_DECLARE(void, importance_of_keys,
            (const fastxattn::ImportanceParams&, const fastxattn::ImportanceItem&, int64_t, void*))

namespace fastxattn {
namespace {

constexpr int64_t kPanelBytes = 128 << 10;  // packed keys of one item: they stay in the second-level cache

auto select_scratch(Isa isa) -> size_t (*)(const AttentionParams&, int64_t) { FXA_SELECT(isa, importance_scratch) }
auto select_item(Isa isa) -> void (*)(const ImportanceParams&, const ImportanceItem&, int64_t, void*) {
  FXA_SELECT(isa, importance_of_keys)
}

}  // namespace

void key_importance(const ImportanceParams& params, const Parallel& parallel, Isa isa) {
  const AttentionParams& p = params.attention;
  std::memset(params.score, 0, static_cast<size_t>(p.heads * p.slots_k) * sizeof(float));
  const int64_t chunk = kPanelBytes / (p.head_dim * 4) / 48 * 48 + 48;
  std::vector<ImportanceItem> runs;  // of every head; task = run * heads + head
  for (int64_t b = 0; b < p.batch; ++b) {
    const Sequence s = sequence_of(p, b);
    if (s.queries == 0) continue;
    for (int64_t k = 0; k < s.keys; k += chunk) {
      runs.push_back({b, 0, k, k + chunk < s.keys ? k + chunk : s.keys});
    }
  }
  const size_t bytes = select_scratch(isa)(p, chunk);
  const auto run = select_item(isa);
  for_each_task(parallel, static_cast<int64_t>(runs.size()) * p.heads, [&](int64_t task, int64_t) {
    ImportanceItem item = runs[static_cast<size_t>(task / p.heads)];
    item.head = task % p.heads;
    run(params, item, chunk, thread_scratch(bytes));
  });
}

}  // namespace fastxattn
