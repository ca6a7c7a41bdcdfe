// Plans the tasks, hands out scratch memory, and calls the kernels of the active instruction set.
#include <memory>
#include <vector>

#include "absorbed_attention/absorbed_attention.h"
#include "core/cpu/isa.h"

namespace fastxattn {

using Params = AbsorbedAttentionParams;
using Grads = AbsorbedAttentionGrads;

FXA_CPU_KERNEL(void, context_forward_panel, (const Params&, const ContextPanel&, uint32_t*, float*))
FXA_CPU_KERNEL(void, context_merge_parts, (const Params&, const ContextPanel&, float*, int64_t))
FXA_CPU_KERNEL(void, context_row_deltas, (const Params&, const Grads&, int64_t, int64_t, float*))
FXA_CPU_KERNEL(void, context_backward_panel,
               (const Params&, const Grads&, const ContextPanel&, int64_t, const float*, const ContextSpan&, float*,
                uint32_t*))
FXA_CPU_KERNEL(void, context_backward_keys,
               (const Params&, const Grads&, const ContextPanel*, const ContextSpan*, int64_t, int64_t, int64_t,
                int64_t, int64_t, uint32_t*))
FXA_CPU_KERNEL(void, context_store_grad_query, (const Params&, const Grads&, int64_t, int64_t, const float*))

namespace {

constexpr int64_t kEnoughTasks = 16;  // below this many panels, keys are split too; a bound on useful splits

// Uninitialised 64-byte aligned memory.
struct Memory {
  explicit Memory(int64_t bytes)
      : raw(new char[static_cast<size_t>(bytes + 64)]),
        at(raw.get() + (64 - reinterpret_cast<uintptr_t>(raw.get()) % 64) % 64) {}
  std::unique_ptr<char[]> raw;
  char* at;
};

int64_t aligned(int64_t words) { return (words + 15) / 16 * 16; }

// Every sequence's panels, in order; `first` gets where each sequence's begin. Depends on the problem alone.
std::vector<ContextPanel> panels_of(const Params& p, std::vector<int64_t>& first) {
  std::vector<ContextPanel> panels;
  for (int64_t b = 0; b < p.batch; ++b) {
    first.push_back(static_cast<int64_t>(panels.size()));
    const int64_t end = p.cu_seqlens_q[b + 1] * p.heads, keys = p.cu_seqlens_k[b + 1] - p.cu_seqlens_k[b];
    for (int64_t row = p.cu_seqlens_q[b] * p.heads; row < end; row += kContextLanes) {
      const int64_t rows = end - row < kContextLanes ? end - row : kContextLanes;
      panels.push_back({row, rows, p.cu_seqlens_k[b], keys, 0, keys, 1});
    }
  }
  first.push_back(static_cast<int64_t>(panels.size()));
  return panels;
}

void clear_unused_rows(const Params& p) {
  const int64_t used = p.cu_seqlens_q[p.batch];
  const int64_t row_bytes = p.heads * p.width * dtype_size(p.dtype);
  zero_bytes(p.out, (p.rows_q - used) * row_bytes, used * row_bytes);
  for (int64_t h = 0; h < p.heads; ++h)
    for (int64_t q = used; q < p.rows_q; ++q) {
      p.lse[h * p.rows_q + q] = -__builtin_inff();
      p.softmax[h * p.rows_q + q] = p.softmax[(p.heads + h) * p.rows_q + q] = 0.0f;
    }
}

}  // namespace

void absorbed_attention_forward(const Params& p, const Parallel& parallel) {
  clear_unused_rows(p);
  std::vector<int64_t> first;
  std::vector<ContextPanel> panels = panels_of(p, first);
  const int64_t count = static_cast<int64_t>(panels.size());
  if (count == 0) return;

  // Few panels: give each several tasks along its keys, of whole blocks.
  struct Task {
    ContextPanel panel;
    int64_t part;  // where its unfinished result goes, -1: nowhere
  };
  std::vector<Task> tasks;
  std::vector<int64_t> first_part(panels.size(), -1);
  int64_t parts = 0;
  const int64_t target = count < kEnoughTasks ? (kEnoughTasks + count - 1) / count : 1;
  for (int64_t n = 0; n < count; ++n) {
    ContextPanel& panel = panels[static_cast<size_t>(n)];
    const int64_t blocks = (panel.keys + kContextKeys - 1) / kContextKeys;
    panel.parts = blocks < target ? (blocks < 1 ? 1 : blocks) : target;
    if (panel.parts > 1) first_part[static_cast<size_t>(n)] = parts;
    for (int64_t i = 0; i < panel.parts; ++i) {
      ContextPanel piece = panel;
      if (panel.parts > 1) {
        piece.begin = blocks * i / panel.parts * kContextKeys;
        piece.end = i + 1 == panel.parts ? panel.keys : blocks * (i + 1) / panel.parts * kContextKeys;
      }
      tasks.push_back({piece, panel.parts > 1 ? parts++ : -1});
    }
  }
  const int64_t words = aligned(context_forward_words(p.width)), part_words = aligned(context_part_words(p.width));
  const int64_t task_count = static_cast<int64_t>(tasks.size());
  const int64_t workers = parallel.workers < task_count ? parallel.workers : task_count;
  const Memory scratch(words * 4 * workers), partial(part_words * 4 * parts);
  auto* scratch_words = reinterpret_cast<uint32_t*>(scratch.at);
  auto* partials = reinterpret_cast<float*>(partial.at);
  const auto run = context_forward_panel_for(active_isa());
  for_each_task(parallel, task_count, [&](int64_t t, int64_t worker) {
    const Task& task = tasks[static_cast<size_t>(t)];
    run(p, task.panel, scratch_words + worker * words, task.part < 0 ? nullptr : partials + task.part * part_words);
  });
  if (parts == 0) return;
  const auto merge = context_merge_parts_for(active_isa());
  for_each_task(parallel, count, [&](int64_t n, int64_t) {
    const int64_t part = first_part[static_cast<size_t>(n)];
    if (part >= 0) merge(p, panels[static_cast<size_t>(n)], partials + part * part_words, part_words);
  });
}

void absorbed_attention_backward(const Params& p, const Grads& g, const Parallel& parallel) {
  std::vector<int64_t> first;
  const std::vector<ContextPanel> panels = panels_of(p, first);
  const int64_t count = static_cast<int64_t>(panels.size());
  const int64_t padded = context_padded(p.width), row_bytes = p.width * dtype_size(p.dtype);
  const int64_t used_rows = p.cu_seqlens_q[p.batch] * p.heads, used_keys = p.cu_seqlens_k[p.batch];
  const bool by_key = g.grad_context != nullptr;
  zero_bytes(g.grad_query, (p.rows_q * p.heads - used_rows) * row_bytes, used_rows * row_bytes);
  if (by_key) {
    zero_bytes(g.grad_context, (p.rows_k - used_keys) * row_bytes, used_keys * row_bytes);
    if (g.grad_key_bias != nullptr)
      for (int64_t k = used_keys; k < p.rows_k; ++k) g.grad_key_bias[k] = 0.0f;
  }

  const int64_t words = aligned(context_backward_words(p.width));
  const Memory scratch(words * 4 * parallel.workers), delta_memory(used_rows * 4);
  auto* scratch_words = reinterpret_cast<uint32_t*>(scratch.at);
  auto* delta = reinterpret_cast<float*>(delta_memory.at);
  const auto deltas = context_row_deltas_for(active_isa());
  for_each_task(parallel, count, [&](int64_t n, int64_t) {
    const ContextPanel& panel = panels[static_cast<size_t>(n)];
    deltas(p, g, panel.row, panel.rows, delta);
  });

  // grad_query is summed over spans in float32: in place when it is float32 of whole vectors, else beside it.
  const bool in_place = g.grad_query != nullptr && p.dtype == DType::f32 && padded == p.width;
  const Memory sum_memory(g.grad_query != nullptr && !in_place ? used_rows * padded * 4 : 0);
  float* sums = in_place ? static_cast<float*>(g.grad_query) : reinterpret_cast<float*>(sum_memory.at);
  const int64_t span_words = kContextSpan * kContextLanes;
  const Memory span_memory(count * (2 * span_words + kContextSpan + 16) * 4);
  std::vector<ContextSpan> spans;
  for (int64_t n = 0; n < count; ++n) {
    auto* at = reinterpret_cast<uint32_t*>(span_memory.at) + n * (2 * span_words + kContextSpan + 16);
    spans.push_back({at, at + span_words, reinterpret_cast<float*>(at + 2 * span_words),
                     reinterpret_cast<uint8_t*>(at + 2 * span_words + kContextSpan)});
  }

  struct Block {
    int64_t sequence, place, keys;
  };
  int64_t longest = 0;
  for (int64_t b = 0; b < p.batch; ++b) {
    const int64_t keys = p.cu_seqlens_k[b + 1] - p.cu_seqlens_k[b];
    longest = keys > longest ? keys : longest;
  }
  const auto run_panel = context_backward_panel_for(active_isa());
  const auto run_keys = context_backward_keys_for(active_isa());
  std::vector<int64_t> active;
  std::vector<Block> blocks;
  for (int64_t from = 0; from == 0 || from < longest; from += kContextSpan) {
    active.clear();
    for (int64_t n = 0; n < count; ++n)
      if (from == 0 || from < panels[static_cast<size_t>(n)].keys) active.push_back(n);
    for_each_task(parallel, static_cast<int64_t>(active.size()), [&](int64_t t, int64_t worker) {
      const size_t n = static_cast<size_t>(active[static_cast<size_t>(t)]);
      float* to = g.grad_query == nullptr ? nullptr : sums + panels[n].row * padded;
      run_panel(p, g, panels[n], from, delta, spans[n], to, scratch_words + worker * words);
    });
    if (!by_key) continue;
    blocks.clear();
    for (int64_t b = 0; b < p.batch; ++b) {
      const int64_t keys = p.cu_seqlens_k[b + 1] - p.cu_seqlens_k[b];
      const int64_t end = from + kContextSpan < keys ? from + kContextSpan : keys;
      for (int64_t place = from; place < end; place += kContextKeys)
        blocks.push_back({b, place, end - place < kContextKeys ? end - place : kContextKeys});
    }
    for_each_task(parallel, static_cast<int64_t>(blocks.size()), [&](int64_t t, int64_t worker) {
      const Block& block = blocks[static_cast<size_t>(t)];
      const int64_t start = first[static_cast<size_t>(block.sequence)];
      const int64_t panel_count = first[static_cast<size_t>(block.sequence) + 1] - start;
      run_keys(p, g, panels.data() + start, spans.data() + start, panel_count,
               p.cu_seqlens_k[block.sequence] + block.place, block.place, block.keys, block.place - from,
               scratch_words + worker * words);
    });
  }
  if (g.grad_query != nullptr && !in_place) {
    const auto finish = context_store_grad_query_for(active_isa());
    for_each_task(parallel, count, [&](int64_t n, int64_t) {
      const ContextPanel& panel = panels[static_cast<size_t>(n)];
      finish(p, g, panel.row, panel.rows, sums + panel.row * padded);
    });
  }
}

}  // namespace fastxattn
