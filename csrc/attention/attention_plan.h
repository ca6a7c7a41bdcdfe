// How a problem is cut into work. The cuts depend on each sequence and on the head counts only, never on the
// number of threads or on the rest of the batch, so that results do not either.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "attention/attention.h"

namespace fastxattn {

inline constexpr int64_t kKeyBlock = 96;        // keys per panel: a multiple of every tile height in core/cpu/gemm.h
inline constexpr int64_t kLaneBlock = 64;       // query rows per score tile
inline constexpr int64_t kLaneChunk = 256;      // query rows that share one packed panel
inline constexpr int64_t kBackwardLanes = 512;  // the same in the backward pass
inline constexpr int64_t kTile = kKeyBlock * kLaneBlock;
inline constexpr int64_t kHeldTiles =
    24;  // tiles of weights, and of their gradients, held at once in the backward pass
inline constexpr int64_t kMaxSplits = 16;  // pieces a sequence's keys are cut into at most

// A piece of the forward pass: some heads of one sequence, a run of lanes, a run of keys.
// A lane is one (query, head of the group) pair: lane = query * group + head_in_group.
struct ForwardItem {
  int64_t sequence;
  int64_t head_begin, head_end;  // key/value heads
  int64_t lane_begin, lane_end;
  int64_t key_begin, key_end;  // key slots
  int64_t split;               // which piece of the keys this is
  int64_t partial;             // where its partial results lie in the workspace (floats), -1: writes the output
  bool few;                    // few query rows: stream the keys instead of tiling
};

// Sums up the pieces of one sequence's keys afterwards.
struct ForwardMerge {
  int64_t sequence, splits;
  int64_t partial;  // workspace offset of the first split
  int64_t stride;   // floats from one split to the next
};

// A run of items that one thread takes at a time, big runs first.
struct TaskRange {
  int64_t begin, end;
};

struct ForwardPlan {
  std::vector<ForwardItem> items;
  std::vector<TaskRange> tasks;
  std::vector<ForwardMerge> merges;
  int64_t workspace = 0;  // floats
};

ForwardPlan plan_forward(const AttentionParams& p);

// A piece of the backward pass: some key/value heads of one sequence, a run of lanes and a run of keys. The partial
// results are floats in the workspace; -1: the item writes the output itself.
struct BackwardItem {
  int64_t sequence;
  int64_t head_begin, head_end;
  int64_t lane_begin, lane_end;
  int64_t key_begin, key_end;
  int64_t query_partial;     // [kv_head][lane of the sequence][head_dim], its share of grad_query
  int64_t key_partial;       // [kv_head][key of the sequence][head_dim + value_dim], its share of grad_key, grad_value
  int64_t key_bias_partial;  // [bias head][key of the sequence], its share of grad_key_bias
  int64_t delta;             // [2][kv_head][lane of the sequence], summed beforehand: delta, 1 / total; -1: not
  int64_t delta_partial;     // where this item's keys' share of that is summed
  bool few;                  // few query rows: stream the keys instead of tiling
};

// The partial results of one sequence: how many, and where.
struct BackwardMerge {
  int64_t sequence;
  int64_t key_chunks, query_chunks;
  int64_t query_partial, query_stride;  // one partial per key chunk; -1: none
  int64_t key_partial, key_stride;      // one partial per query chunk; -1: none
  int64_t key_bias_partial, key_bias_stride;
};

// A sequence whose delta is summed beforehand: per key chunk, delta and then the weights' own sum, by lane.
struct DeltaMerge {
  int64_t lanes;       // kv_heads * lanes of the sequence
  int64_t at, stride;  // workspace offset of the first chunk, floats from one to the next
  int64_t chunks;
};

// What weights are multiplied by so that they sum to 1: nothing where no key is seen, or where the sum is not a number.
inline float inverse_total(float total) { return total > 0.0f && total <= 3.4e38f ? 1.0f / total : 1.0f; }

struct BackwardPlan {
  std::vector<BackwardItem> items;
  std::vector<TaskRange> tasks;
  std::vector<BackwardMerge> merges;
  int64_t workspace = 0;          // floats
  bool queries_left_out = false;  // some query row in use belongs to no item: its gradient is zero
  bool keys_left_out = false;     // the same for key rows
  std::vector<int64_t> delta;     // by sequence: where its delta lies in the workspace, -1: nowhere
  std::vector<DeltaMerge> deltas;
};

BackwardPlan plan_backward(const AttentionParams& p, const AttentionGradients& g, const AttentionContent& content);

// A region of grad_bias that one thread owns: fixed indices along the axes that are not summed.
struct BiasItem {
  int64_t batch_begin, batch_end;  // sequences that add to it
  int64_t head_begin, head_end;    // key/value heads that add to it
  int64_t place_begin, place_end;  // query places that add to it
};

std::vector<BiasItem> plan_bias(const AttentionParams& p);

// The thread's own scratch memory, at least `bytes`, 64-byte aligned, kept between calls.
void* thread_scratch(size_t bytes);

// Groups items of the given costs into tasks of at least a grain each, and orders them by falling cost.
std::vector<TaskRange> make_tasks(const std::vector<double>& costs);

}  // namespace fastxattn
