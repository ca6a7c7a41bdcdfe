// Which instance of the attention kernels runs a problem, for whoever launches: a device (attention_sm80.cu) or the
// runner of the tests. `launch(kernel, blocks, parts, threads, shared_bytes, arguments...)` gets each launch in order.
#pragma once

#include "attention/attention_bwd.cuh"
#include "attention/attention_fwd.cuh"

namespace fastxattn::attention {

// What the plain kernels do not know.
inline bool is_rich(const AttentionKernelParams& p) {
  return p.kv_range != nullptr || p.key_bias != nullptr || scales_scores(p);
}
inline int widest(const AttentionKernelParams& p) { return p.head_dim > p.value_dim ? p.head_dim : p.value_dim; }

// The widest head dim: beyond it, float32 accumulators and split operands do not fit in registers.
template <class T>
inline constexpr int kWidest = sizeof(T) == 4 ? 128 : 256;

// Calls f with the padded head dim, at most kWidest, as a type.
template <class T, class F>
void with_dim(int dim, F f) {
  if (dim <= 32) return f(std::integral_constant<int, 32>{});
  if (dim <= 64) return f(std::integral_constant<int, 64>{});
  if constexpr (kWidest<T> > 128) {
    if (dim > 128) return f(std::integral_constant<int, 256>{});
  }
  f(std::integral_constant<int, 128>{});
}
template <class F>
void with_flag(bool flag, F f) {
  if (flag) return f(std::true_type{});
  f(std::false_type{});
}

// `few`: only what attention_wgmma.cuh leaves.
template <class T, class Launch>
void run_forward(const AttentionKernelParams& p, bool few, Launch launch) {
  with_dim<T>(widest(p), [&](auto dim) {
    with_flag(is_rich(p), [&](auto rich) {
      using Tile = ForwardTile<T, dim.value>;
      const int64_t tiles = few ? p.batch : tile_count(p.slots_q, p.batch, p.group, Tile::kRows);
      launch(attention_forward_kernel<T, dim.value, Tile::kRows, Tile::kKeys, rich.value>,
             (tiles + p.chunks) * p.kv_heads, 1, 2 * Tile::kRows,
             forward_shared_bytes<T, dim.value, Tile::kRows, Tile::kKeys>(), p,
             ForwardWork{static_cast<int>(tiles), few});
      if (p.chunks > 0) {
        launch(attention_merge_kernel<T>, static_cast<int64_t>(p.chunks) * p.kv_heads, 1, 128, 0, p, Tile::kKeys);
      }
    });
  });
}

template <class T, class Launch>
void run_backward(const AttentionKernelParams& p, const AttentionKernelGradients& g, Launch launch) {
  if constexpr (sizeof(T) != 4) {
    launch(attention_delta_kernel<T>, (static_cast<int64_t>(p.rows_q) * p.kv_heads * p.group + 3) / 4, 1, 128, 0, p, g);
  }
  with_dim<T>(widest(p), [&](auto dim) {
    with_flag(is_rich(p), [&](auto rich) {
      constexpr bool exact = sizeof(T) == 4;
      using Tile = BackwardTile<T, dim.value>;
      if (g.grad_query != nullptr || exact) {
        launch(attention_backward_query_kernel<T, dim.value, Tile::kRows, Tile::kKeys, rich.value>,
               tile_count(p.slots_q, p.batch, p.group, Tile::kRows) * p.kv_heads, 1, 2 * Tile::kRows,
               backward_shared_bytes<T, dim.value, Tile::kRows, Tile::kKeys>(), p, g);
      }
      if (g.grad_key != nullptr || g.grad_value != nullptr || g.grad_key_bias != nullptr) {
        launch(attention_backward_key_kernel<T, dim.value, Tile::kRows, Tile::kKeys, rich.value>,
               tile_count(p.slots_k, p.batch, 1, Tile::kRows) * p.kv_heads, dim.value / Tile::kColumns, 2 * Tile::kRows,
               backward_shared_bytes<T, dim.value, Tile::kRows, Tile::kKeys>(), p, g);
      }
    });
  });
}

}  // namespace fastxattn::attention
