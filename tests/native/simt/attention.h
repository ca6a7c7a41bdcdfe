// The attention kernels under the runner, for the files that instantiate them by dtype.
#pragma once

#include "attention/attention_select.cuh"
#include "attention/attention_wgmma.cuh"
#include "simt/bind.h"

namespace fastxattn::simt {

template <class T>
AttentionKernelParams attention_params(const Arguments& a, Memory& memory) {
  AttentionKernelParams p;
  p.query = a.input<T>(memory, "query"), p.key = a.input<T>(memory, "key"), p.value = a.input<T>(memory, "value");
  const Argument &query = a.get("query"), &key = a.get("key"), &value = a.get("value");
  p.query_row = query.strides[0], p.query_head = query.strides[1];
  p.key_row = key.strides[0], p.key_head = key.strides[1];
  p.value_row = value.strides[0], p.value_head = value.strides[1];
  p.rows_q = a.size("query"), p.rows_k = a.size("key");
  p.kv_heads = a.size("key", 1), p.group = a.size("query", 1) / p.kv_heads;
  p.head_dim = a.size("query", 2), p.value_dim = a.size("value", 2);
  p.batch = a.size("cu_seqlens_q") - 1;
  p.aligned = a.integer("aligned") != 0;
  p.cu_q = a.input<int32_t>(memory, "cu_seqlens_q"), p.cu_k = a.input<int32_t>(memory, "cu_seqlens_k");
  p.used_q = a.input<int32_t>(memory, "seqused_q"), p.used_k = a.input<int32_t>(memory, "seqused_k");
  p.index_q = a.input<int32_t>(memory, "query_index"), p.index_k = a.input<int32_t>(memory, "key_index");
  p.slots_q = p.index_q != nullptr ? a.size("query_index") : p.rows_q;
  p.slots_k = p.index_k != nullptr ? a.size("key_index") : p.rows_k;
  p.kv_range = a.input<int32_t>(memory, "kv_range");
  p.key_bias = a.input<float>(memory, "key_bias");
  if (p.key_bias != nullptr) {
    p.key_bias_row = a.get("key_bias").strides[0];
    p.key_bias_head = a.get("key_bias").dims == 2 ? a.get("key_bias").strides[1] : 0;
  }
  p.scale = static_cast<float>(a.number("scale"));
  p.softcap = static_cast<float>(a.number("softcap"));
  return p;
}

// Launches on the runner instead of a device, and refuses the maps that the driver would refuse.
struct OnRunner {
  Runner& runner;
  uint64_t order;

  template <class Kernel, class... Values>
  void operator()(Kernel kernel, int64_t blocks, int parts, int threads, int shared_bytes, const Values&... values) {
    runner.run("attention",
               {.grid_x = static_cast<int>(blocks),
                .grid_y = parts,
                .threads = threads,
                .shared_bytes = static_cast<size_t>(shared_bytes),
                .order = order},
               [&] { kernel(values...); });
  }
  gpu::TensorMap tensor_map(const gpu::RowsTile& tile) const {
    const auto steps = [](int64_t n, int64_t stride) { return n == 1 || (stride > 0 && stride % 8 == 0); };
    if (reinterpret_cast<uintptr_t>(tile.base) % 16 != 0 || tile.width < 1 || tile.rows < 1 || tile.heads < 1 ||
        !steps(tile.rows, tile.row_stride) || !steps(tile.heads, tile.head_stride) || tile.tile_rows > 256) {
      throw SimtFault("a tensor map of this layout cannot be made");
    }
    return tile;
  }
};

inline void set_parts(AttentionKernelParams& p, const Arguments& a, Memory& memory) {
  p.part_out = a.output<float>(memory, "part_out"), p.part_lse = a.output<float>(memory, "part_lse");
  if (p.part_out != nullptr) p.chunks = a.size("part_out"), p.part_rows = a.size("part_out", 2);
}

template <class T>
Statistics attention_forward(const Arguments& a) {
  Memory memory;
  AttentionKernelParams p = attention_params<T>(a, memory);
  p.out = a.output<T>(memory, "out"), p.lse = a.output<float>(memory, "lse");
  set_parts(p, a, memory);
  Runner runner(memory);
  attention::run_forward<T>(p, false, OnRunner{runner, static_cast<uint64_t>(a.integer("order", 0))});
  return runner.statistics();
}

template <class T>
Statistics attention_forward_wgmma(const Arguments& a) {
  Memory memory;
  AttentionKernelParams p = attention_params<T>(a, memory);
  p.out = a.output<T>(memory, "out"), p.lse = a.output<float>(memory, "lse");
  if (!attention::fits_wgmma<T>(p)) throw SimtFault("the kernel for compute capability 9.0 does not take this problem");
  set_parts(p, a, memory);
  Runner runner(memory);
  const OnRunner launch{runner, static_cast<uint64_t>(a.integer("order", 0))};
  attention::run_forward_wgmma<T>(p, launch);
  attention::run_forward<T>(p, true, launch);
  return runner.statistics();
}

template <class T>
Statistics attention_backward(const Arguments& a) {
  Memory memory;
  AttentionKernelParams p = attention_params<T>(a, memory);
  p.out = const_cast<T*>(a.input<T>(memory, "out"));
  p.lse = const_cast<float*>(a.input<float>(memory, "lse"));
  AttentionKernelGradients g;
  g.grad_out = a.input<T>(memory, "grad_out");
  g.grad_out_row = a.get("grad_out").strides[0], g.grad_out_head = a.get("grad_out").strides[1];
  g.grad_lse = a.input<float>(memory, "grad_lse");
  g.delta = a.output<float>(memory, "delta"), g.norm = a.output<float>(memory, "norm");
  g.grad_query = a.output<T>(memory, "grad_query");
  g.grad_key = a.output<T>(memory, "grad_key"), g.grad_value = a.output<T>(memory, "grad_value");
  g.grad_key_bias = a.output<float>(memory, "grad_key_bias");
  g.key_bias_has_heads = p.key_bias_head != 0 || (a.find("key_bias") != nullptr && a.get("key_bias").dims == 2);
  Runner runner(memory);
  attention::run_backward<T>(p, g, OnRunner{runner, static_cast<uint64_t>(a.integer("order", 0))});
  return runner.statistics();
}

}  // namespace fastxattn::simt
