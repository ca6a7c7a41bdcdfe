#include <algorithm>
#include <memory>

#include "attention/attention_plan.h"
#include "co_attention/co_attention.h"

namespace fastxattn {

using Params = CoAttentionParams;
using Item = CoAttentionItem;
using Merge = CoAttentionMerge;

FXA_CPU_KERNEL(size_t, co_attention_scratch, (const Params&, const Item&, bool))
FXA_CPU_KERNEL(void, co_attention_forward_item, (const Params&, const Item&, float*, void*))
FXA_CPU_KERNEL(void, co_attention_forward_merge, (const Params&, const Merge&, float*))
FXA_CPU_KERNEL(void, co_attention_backward_item, (const Params&, const Item&, bool, float*, void*))
FXA_CPU_KERNEL(void, co_attention_backward_merge, (const Params&, const Merge&, bool, float*))
FXA_CPU_KERNEL(void, co_attention_center, (const Params&, int, int64_t, int64_t))

namespace {

struct Plan {
  std::vector<Item> items;  // falling cost
  std::vector<Merge> merges;
  int64_t workspace = 0;               // floats
  bool every_row[2] = {false, false};  // each row of the side belongs to some item
};

constexpr int64_t kFewKeys = 16;

constexpr int64_t round16(int64_t n) { return (n + 15) / 16 * 16; }

// Cuts depend on the sequence alone: neither threads nor neighbours change a result.
Plan make_plan(const Params& p, bool backward) {
  Plan plan;
  int64_t covered[2] = {0, 0};
  for (int64_t b = 0; b < p.batch; ++b) {
    int64_t length[2];
    for (int side = 0; side < 2; ++side) length[side] = p.side[side].cu[b + 1] - p.side[side].cu[b];
    if (length[0] == 0 || length[1] == 0) continue;
    covered[0] += length[0], covered[1] += length[1];
    const int lane_side = length[0] >= length[1] ? 0 : 1;
    const int64_t lanes = length[lane_side], keys = length[1 - lane_side];
    const int64_t pieces = (lanes + kCoAttentionLanes - 1) / kCoAttentionLanes;
    // Enough for every instruction set: vectors have 16 floats at most.
    const int64_t row = backward ? 32 + round16(p.head_dim) + round16(p.side[1 - lane_side].value_dim)
                                 : 16 + round16(p.side[lane_side].value_dim);
    const int64_t stride = round16(keys + 16) + keys * row;
    for (int64_t h = 0; h < p.heads; ++h) {
      Item item{b, h, lane_side, 0, 0, keys, pieces > 1 ? plan.workspace : -1};
      if (pieces > 1) plan.merges.push_back({item, pieces, stride});
      for (int64_t piece = 0; piece < pieces; ++piece) {
        item.lane_begin = piece * kCoAttentionLanes;
        item.lane_end = std::min(lanes, item.lane_begin + kCoAttentionLanes);
        if (pieces > 1) item.partial = plan.workspace, plan.workspace += stride;
        plan.items.push_back(item);
      }
    }
  }
  std::stable_sort(plan.items.begin(), plan.items.end(), [](const Item& a, const Item& b) {
    return (a.lane_end - a.lane_begin) * a.keys > (b.lane_end - b.lane_begin) * b.keys;
  });
  for (int side = 0; side < 2; ++side) plan.every_row[side] = covered[side] == p.side[side].rows;
  return plan;
}

std::unique_ptr<float[]> floats(int64_t n) { return std::unique_ptr<float[]>(n > 0 ? new float[n] : nullptr); }

}  // namespace

std::string check_co_attention(const CoAttentionParams& p) {
  for (int side = 0; side < 2; ++side) {
    const std::string name = side == 0 ? "cu_seqlens_a" : "cu_seqlens_b";
    const int32_t* cu = p.side[side].cu;
    if (cu[0] != 0) return name + " must start at 0";
    for (int64_t b = 0; b < p.batch; ++b) {
      if (cu[b + 1] < cu[b]) return name + " must not decrease";
    }
    if (cu[p.batch] > p.side[side].rows) return name + " must end within the tokens";
  }
  return {};
}

void co_attention_forward(const Params& p, const Parallel& parallel, Isa isa) {
  const Plan plan = make_plan(p, false);
  for (int side = 0; side < 2; ++side) {
    const CoAttentionSide& s = p.side[side];
    if (plan.every_row[side]) continue;
    const int64_t n = s.rows * p.heads * p.side[1 - side].value_dim;
    zero_bytes(s.out, n * dtype_size(p.dtype));
    std::fill_n(s.lse, s.rows * p.heads, -__builtin_inff());
  }
  const auto run = co_attention_forward_item_for(isa);
  const auto bytes = co_attention_scratch_for(isa);
  const auto workspace = floats(plan.workspace);
  for_each_task(parallel, static_cast<int64_t>(plan.items.size()), [&](int64_t i, int64_t) {
    const Item& item = plan.items[static_cast<size_t>(i)];
    run(p, item, workspace.get(), thread_scratch(bytes(p, item, false)));
  });
  const auto merge = co_attention_forward_merge_for(isa);
  for_each_task(parallel, static_cast<int64_t>(plan.merges.size()),
                [&](int64_t i, int64_t) { merge(p, plan.merges[static_cast<size_t>(i)], workspace.get()); });
}

void co_attention_backward(const Params& given, const Parallel& parallel, Isa isa) {
  Params p = given;
  const Plan plan = make_plan(p, true);
  const auto center = co_attention_center_for(isa);
  std::unique_ptr<float[]> statistics[2];
  constexpr int64_t kRows = 256;
  for (int side = 0; side < 2; ++side) {
    CoAttentionSide& s = p.side[side];
    statistics[side] = floats(2 * p.heads * s.rows);
    s.delta = statistics[side].get();
    s.norm = s.delta + p.heads * s.rows;
    for_each_task(parallel, (s.rows + kRows - 1) / kRows,
                  [&](int64_t i, int64_t) { center(p, side, i * kRows, std::min(s.rows, (i + 1) * kRows)); });
    const auto clear = [&](void* grad, int64_t dim) {
      if (!plan.every_row[side]) zero_bytes(grad, s.rows * p.heads * dim * dtype_size(p.dtype));
    };
    clear(s.grad_query, p.head_dim);
    clear(s.grad_value, s.value_dim);
    if (s.grad_bias != nullptr) std::fill_n(s.grad_bias, p.heads * s.rows, 0.0f);
  }
  const auto run = co_attention_backward_item_for(isa);
  const auto bytes = co_attention_scratch_for(isa);
  const auto merge = co_attention_backward_merge_for(isa);
  const auto workspace = floats(plan.workspace);
  // In 16 bits delta from the rounded out is near enough but for softmaxes over a few tokens.
  const auto needed = [&](const Item& item, bool sums_only) {
    return !sums_only || p.dtype == DType::f32 || item.keys < kFewKeys;
  };
  const auto pass = [&](bool sums_only) {
    for_each_task(parallel, static_cast<int64_t>(plan.items.size()), [&](int64_t i, int64_t) {
      const Item& item = plan.items[static_cast<size_t>(i)];
      if (needed(item, sums_only)) run(p, item, sums_only, workspace.get(), thread_scratch(bytes(p, item, true)));
    });
    for_each_task(parallel, static_cast<int64_t>(plan.merges.size()), [&](int64_t i, int64_t) {
      const Merge& one = plan.merges[static_cast<size_t>(i)];
      if (needed(one.first, sums_only)) merge(p, one, sums_only, workspace.get());
    });
  };
  pass(true);
  pass(false);
}

}  // namespace fastxattn
