// Attention backward for compute capability 8.0: gradients of queries by rows of queries, gradients of keys, values and
// key bias by rows of keys, so that every result is summed by one block in one order.
//
// Both passes recompute the weights P from lse and need dS = P (dO V^T - delta). With float32 the weights are divided
// by their sum, which the rounding of lse takes off 1 by more than the rest of the arithmetic is wrong.
#pragma once

#include "attention/attention_tiles.cuh"

namespace fastxattn::attention {

// kRows: rows a block owns (queries in one pass, keys in the other), kKeys: rows of the other side per tile, two
// stages. kColumns: columns of dK and dV that a block of the second pass sums; all of them would not fit in registers.
template <class T, int D>
struct BackwardTile {
  static constexpr int kRows = sizeof(T) == 4 && D > 64 ? 32 : 64;
  static constexpr int kKeys = sizeof(T) == 4 ? 16 : D <= 64 ? 64 : D <= 128 ? 32 : 16;
  static constexpr int kMost = sizeof(T) == 4 ? 64 : 128;
  static constexpr int kColumns = D < kMost ? D : kMost;
};

template <class T, int D, int Rows, int Keys>
constexpr int backward_shared_bytes() {
  return (2 * Rows + 4 * Keys) * D * static_cast<int>(sizeof(T)) + 16 + 2 * 5 * Keys * 4;
}

// What weights are recomputed against, in units of T; infinite for a row without weights. Scores lie about the
// logarithm of the number of keys below lse, and the rounding of the difference grows with it: float32 takes half of it
// off. Its weights are divided by their sum, so that nothing has to be given back.
template <class T>
FXA_DEVICE float base_of(float lse, int keys) {
  if (lse == -kInfinity) return kInfinity;
  if constexpr (sizeof(T) == 4) return lse - 0.5f * accurate_log(static_cast<float>(keys));
  return lse * kUnit<T>;
}

// delta = sum(grad_out * out) - grad_lse of every row and head, 0 in rows that see nothing: what grad_out holds there
// must not matter. One warp each, blocks of 128 threads. Not for float32.
template <class T>
FXA_KERNEL(128, 1)
attention_delta_kernel(FXA_PARAMS AttentionKernelParams p, FXA_PARAMS AttentionKernelGradients g) {
  const int heads = p.kv_heads * p.group;
  const int64_t item = static_cast<int64_t>(block_index()) * 4 + warp_index();
  if (item >= static_cast<int64_t>(p.rows_q) * heads) return;
  const int64_t row = item / heads, head = item % heads, place = head * p.rows_q + row;
  const T* out = static_cast<const T*>(p.out) + item * p.value_dim;
  const T* grad = static_cast<const T*>(g.grad_out) + row * g.grad_out_row + head * g.grad_out_head;
  float sum = 0.0f;
  for (int i = lane_index(); i < p.value_dim; i += 32) {
    sum = fused(to_float(load_global(out + i)), to_float(load_global(grad + i)), sum);
  }
  for (int mask = 16; mask > 0; mask /= 2) sum += shuffle_xor(sum, mask);
  if (lane_index() != 0) return;
  if (g.grad_lse != nullptr) sum -= load_global(g.grad_lse + place);
  store_global(g.delta + place, load_global(p.lse + place) == -kInfinity ? 0.0f : sum);
}

// dQ. Grid: (tile_count(slots_q, batch, group, Rows) * kv_heads), blocks of 2 Rows threads.
template <class T, int D, int Rows, int Keys, bool Rich>
FXA_KERNEL(2 * Rows, 1)
attention_backward_query_kernel(FXA_PARAMS AttentionKernelParams p, FXA_PARAMS AttentionKernelGradients g) {
  constexpr int kThreads = 2 * Rows, kStep = Operand<T>::kStep, kSize = static_cast<int>(sizeof(T));
  constexpr bool kExact = sizeof(T) == 4;
  const Shared<T> queries = shared_memory<T>(0), grads = queries.at(Rows * D);
  const Shared<T> key_tiles = grads.at(Rows * D), value_tiles = key_tiles.at(2 * Keys * D);
  const Shared<int> scratch = shared_memory<int>((2 * Rows + 4 * Keys) * D * kSize);

  const int kv_head = block_index() % p.kv_heads, heads = p.kv_heads * p.group;
  const TileOf tile = find_sequence(p.cu_q, p.batch, block_index() / p.kv_heads, p.group, Rows);
  const Span mine = find_span(p.cu_q, p.used_q, p.slots_q, tile.sequence);
  const Span theirs = find_span(p.cu_k, p.used_k, p.slots_k, tile.sequence);
  const int first_row = tile.number * Rows, rows = minimum(mine.count * p.group - first_row, Rows);
  if (tile.number < 0 || rows <= 0) return;
  const auto query_row = [&](int i) { return find_row(p.index_q, mine.first + (first_row + i) / p.group, p.rows_q); };
  const auto head_of = [&](int i) { return kv_head * p.group + (first_row + i) % p.group; };
  const int warp_row = warp_index() * 16;
  const bool active = warp_row < rows;
  int my_row[2], my_head[2];
  bool there[2];
  Range range[2];
  float lse[2], delta[2];
  [[maybe_unused]] float grad_lse[2], norm[2] = {0.0f, 0.0f}, lost[2] = {0.0f, 0.0f}, inverse[2] = {1.0f, 1.0f};
  FXA_UNROLL
  for (int half = 0; half < 2; ++half) {
    const int i = warp_row + lane_index() / 4 + 8 * half;
    there[half] = i < rows;
    my_row[half] = query_row(there[half] ? i : 0);
    my_head[half] = head_of(there[half] ? i : 0);
    range[half] = Rich ? find_range(p.kv_range, my_row[half], theirs.count) : Range{0, theirs.count};
    const int64_t place = static_cast<int64_t>(my_head[half]) * p.rows_q + my_row[half];
    lse[half] = base_of<T>(load_global(p.lse + place), theirs.count);
    if constexpr (kExact) {
      delta[half] = 0.0f;
      grad_lse[half] = g.grad_lse != nullptr ? load_global(g.grad_lse + place) : 0.0f;
    } else {
      delta[half] = load_global(g.delta + place);
    }
  }
  Window window{0, theirs.count, 0, theirs.count};
  if constexpr (Rich) window = find_window(scratch, range, there, theirs.count);
  const int low = window.low / Keys * Keys, high = window.high;

  const T* key_base = static_cast<const T*>(p.key) + kv_head * p.key_head;
  const T* value_base = static_cast<const T*>(p.value) + kv_head * p.value_head;
  const auto load_keys = [&](int first, int stage) {
    const int count = theirs.count - first, slot = theirs.first + first;
    load_rows<T, D, Keys, kThreads>(key_tiles.at(stage * Keys * D), count, p.head_dim, p.aligned,
                                    {key_base, p.key_row, p.index_k, slot, p.rows_k});
    load_rows<T, D, Keys, kThreads>(value_tiles.at(stage * Keys * D), count, p.value_dim, p.aligned,
                                    {value_base, p.value_row, p.index_k, slot, p.rows_k});
    cp_async_commit();
  };
  load_tile<T, D, Rows, kThreads>(queries, rows, p.head_dim, p.aligned, [&](int i) {
    return static_cast<const T*>(p.query) + query_row(i) * p.query_row + head_of(i) * p.query_head;
  });
  load_tile<T, D, Rows, kThreads>(grads, rows, p.value_dim, p.aligned, [&](int i) {
    return static_cast<const T*>(g.grad_out) + query_row(i) * g.grad_out_row + head_of(i) * g.grad_out_head;
  });
  if (low < high) load_keys(low, 0);

  const auto operand_of = [&](Shared<T> from) {
    return [=](int step) {
      Operand<T> a;
      a.template load<D>(from, warp_row, step * kStep);
      return a;
    };
  };
  float acc[D / 8][4] = {};
  const int tiles = low < high ? (high - low + Keys - 1) / Keys : 0;
  const int steps = kExact && g.grad_query != nullptr ? 2 * tiles : tiles;
  FXA_NO_UNROLL
  for (int step = 0; step < steps; ++step) {
    const int stage = step & 1, first = low + step % tiles * Keys;
    const Shared<T> keys = key_tiles.at(stage * Keys * D);
    const bool whole = Rich ? first >= window.all_low && first + Keys <= window.all_high : first + Keys <= theirs.count;
    cp_async_wait<0>();
    bool bad = false;
    if constexpr (Rich) {
      bad = sync_threads_or(!whole && loaded_bad<T, D, Keys, kThreads>(keys, p.aligned));
    } else {
      sync_threads();
    }
    if (step + 1 < steps) load_keys(low + (step + 1) % tiles * Keys, stage ^ 1);
    if (!active) continue;
    float s[Keys / 8][4] = {}, ds[Keys / 8][4] = {}, slope[Rich ? Keys / 8 : 1][4];
    multiply_rows<T, D, Keys>(s, operand_of(queries), keys);
    multiply_rows<T, D, Keys>(ds, operand_of(grads), value_tiles.at(stage * Keys * D));
    if constexpr (Rich) {
      scale_scores<T>(p, s, slope);
      if (p.key_bias != nullptr) add_key_bias<T>(p, theirs, first, my_head, s);
    }
    FXA_UNROLL
    for (int i = 0; i < Keys / 2; ++i) {
      const int n = i / 4, e = i % 4, half = e / 2, key = first + column_of(n, e);
      const float factor = Rich ? 1.0f : p.scale * kUnit<T>;
      const bool seen = Rich ? range[half].sees(key) : key < theirs.count;
      float weight = power<T>(fused(s[n][e], factor, -lse[half]));
      if constexpr (kExact) {
        if (step < tiles) {
          // Compensated (Kahan): over thousands of keys the sum's own rounding would be the largest error.
          const float term = (seen ? weight : 0.0f) - lost[half], next = norm[half] + term;
          lost[half] = (next - norm[half]) - term;
          norm[half] = next;
          delta[half] += seen ? weight * ds[n][e] : 0.0f;
          continue;
        }
        weight *= inverse[half];
      }
      float grad = weight * (ds[n][e] - delta[half]);
      if constexpr (Rich) grad *= slope[n][e];
      ds[n][e] = seen ? grad : 0.0f;
    }
    if (kExact && step < tiles) {
      if (step < tiles - 1) continue;
      FXA_UNROLL
      for (int half = 0; half < 2; ++half) {
        const float total = quad_sum(norm[half]), dot = quad_sum(delta[half]);
        norm[half] = total == 0.0f ? 1.0f : total;
        inverse[half] = 1.0f / norm[half];
        delta[half] = total == 0.0f ? 0.0f : dot * inverse[half] - grad_lse[half];
      }
      continue;
    }
    if (Rich && bad) {
      multiply_depth_guarded<T, D, Keys, D>(acc, ds, keys, bad_rows<T, D, Keys>(keys),
                                            [&](int half, int k) { return range[half].sees(first + k); });
    } else {
      multiply_depth<T, D, Keys, D>(acc, ds, keys);
    }
  }
  if (!active) return;
  FXA_UNROLL
  for (int half = 0; half < 2; ++half) {
    if (!there[half]) continue;
    const int64_t place = static_cast<int64_t>(my_head[half]) * p.rows_q + my_row[half];
    if (kExact && lane_index() % 4 == 0) {
      store_global(g.norm + place, tiles == 0 ? 1.0f : norm[half]);
      store_global(g.delta + place, delta[half]);
    }
    if (g.grad_query == nullptr) continue;
    const int64_t item = static_cast<int64_t>(my_row[half]) * heads + my_head[half];
    store_row(static_cast<T*>(g.grad_query) + item * p.head_dim, acc, half, p.scale, p.head_dim);
  }
}

// What the second pass needs to know about a tile's queries, besides their rows.
struct QueryFacts {
  Shared<float> lse, delta, inverse;
  Shared<int> start, end;
  FXA_DEVICE QueryFacts(Shared<float> at, int queries)
      : lse(at),
        delta(at.at(queries)),
        inverse(at.at(2 * queries)),
        start(at.at(3 * queries).as<int>()),
        end(at.at(4 * queries).as<int>()) {}
};

// dK, dV and the gradient of key_bias. Grid: (tile_count(slots_k, batch, 1, Rows) * kv_heads, D / kColumns); here the
// block owns Rows keys and goes through the queries, Queries at a time, of each head of the group in turn.
template <class T, int D, int Rows, int Queries, bool Rich>
FXA_KERNEL(2 * Rows, 1)
attention_backward_key_kernel(FXA_PARAMS AttentionKernelParams p, FXA_PARAMS AttentionKernelGradients g) {
  constexpr int kThreads = 2 * Rows, kStep = Operand<T>::kStep, kSize = static_cast<int>(sizeof(T));
  constexpr int kColumns = BackwardTile<T, D>::kColumns;
  constexpr bool kExact = sizeof(T) == 4;
  const Shared<T> keys = shared_memory<T>(0), values = keys.at(Rows * D);
  const Shared<T> query_tiles = values.at(Rows * D), grad_tiles = query_tiles.at(2 * Queries * D);
  const Shared<int> home = shared_memory<int>((2 * Rows + 4 * Queries) * D * kSize);
  const Shared<float> fact_tiles = home.at(4).template as<float>();

  const int kv_head = block_index() % p.kv_heads, first_column = block_index_y() * kColumns;
  const TileOf tile = find_sequence(p.cu_k, p.batch, block_index() / p.kv_heads, 1, Rows);
  const Span mine = find_span(p.cu_k, p.used_k, p.slots_k, tile.sequence);
  const Span theirs = find_span(p.cu_q, p.used_q, p.slots_q, tile.sequence);
  const int first_key = tile.number * Rows, rows = minimum(mine.count - first_key, Rows);
  if (tile.number < 0 || rows <= 0) return;
  const int warp_row = warp_index() * 16;
  const bool active = warp_row < rows;
  const int first_slot = mine.first + first_key;
  // Kept out of the registers, which the sums fill: where the keys begin, and how many are here.
  if (thread_index() == 0) {
    home.store(0, mine.first);
    home.store(1, rows);
  }
  sync_threads();
  load_rows<T, D, Rows, kThreads>(
      keys, rows, p.head_dim, p.aligned,
      {static_cast<const T*>(p.key) + kv_head * p.key_head, p.key_row, p.index_k, first_slot, p.rows_k});
  load_rows<T, D, Rows, kThreads>(
      values, rows, p.value_dim, p.aligned,
      {static_cast<const T*>(p.value) + kv_head * p.value_head, p.value_row, p.index_k, first_slot, p.rows_k});

  const int tiles = (theirs.count + Queries - 1) / Queries, steps = tiles * p.group;
  const auto facts_of = [&](int stage) { return QueryFacts(fact_tiles.at(stage * 5 * Queries), Queries); };
  const auto load_queries = [&](int step, int stage) {
    const int head = kv_head * p.group + step / tiles, first = step % tiles * Queries;
    const int count = theirs.count - first, slot = theirs.first + first;
    load_rows<T, D, Queries, kThreads>(
        query_tiles.at(stage * Queries * D), count, p.head_dim, p.aligned,
        {static_cast<const T*>(p.query) + head * p.query_head, p.query_row, p.index_q, slot, p.rows_q});
    load_rows<T, D, Queries, kThreads>(
        grad_tiles.at(stage * Queries * D), count, p.value_dim, p.aligned,
        {static_cast<const T*>(g.grad_out) + head * g.grad_out_head, g.grad_out_row, p.index_q, slot, p.rows_q});
    cp_async_commit();
    const QueryFacts facts = facts_of(stage);
    for (int i = thread_index(); i < Queries; i += kThreads) {
      float lse = kInfinity, delta = 0.0f, inverse = 1.0f;
      Range range{mine.count, 0};
      if (i < count) {
        const int row = find_row(p.index_q, slot + i, p.rows_q);
        const int64_t place = static_cast<int64_t>(head) * p.rows_q + row;
        lse = base_of<T>(load_global(p.lse + place), mine.count);
        delta = load_global(g.delta + place);
        if constexpr (kExact) inverse = 1.0f / load_global(g.norm + place);
        if constexpr (Rich) range = find_range(p.kv_range, row, mine.count);
      }
      facts.lse.store(i, lse);
      facts.delta.store(i, delta);
      if constexpr (kExact) facts.inverse.store(i, inverse);
      if constexpr (Rich) {
        facts.start.store(i, range.start);
        facts.end.store(i, range.end);
      }
    }
  };
  if (steps > 0) load_queries(0, 0);

  const auto operand_of = [&](Shared<T> from) {
    return [=](int step) {
      Operand<T> a;
      a.template load<D>(from, warp_row, step * kStep);
      return a;
    };
  };
  float grad_key[kColumns / 8][4] = {}, grad_value[kColumns / 8][4] = {}, grad_bias[2] = {0.0f, 0.0f};
  int my_key[2];  // within the sequence
  FXA_UNROLL
  for (int half = 0; half < 2; ++half) my_key[half] = first_key + warp_row + lane_index() / 4 + 8 * half;
  const auto store_bias = [&](int head, int heads) {
    FXA_UNROLL
    for (int half = 0; half < 2; ++half) {
      const float total = quad_sum(grad_bias[half]);
      grad_bias[half] = 0.0f;
      if (lane_index() % 4 == 0 && my_key[half] < first_key + home.load(1) && block_index_y() == 0) {
        store_global(g.grad_key_bias + static_cast<int64_t>(home.load(0) + my_key[half]) * heads + head, total);
      }
    }
  };

  FXA_NO_UNROLL
  for (int step = 0; step < steps; ++step) {
    const int stage = step & 1, head = kv_head * p.group + step / tiles;
    const Shared<T> queries = query_tiles.at(stage * Queries * D), grads = grad_tiles.at(stage * Queries * D);
    cp_async_wait<0>();
    bool bad = false;
    if constexpr (Rich) {
      bad = sync_threads_or(loaded_bad<T, D, Queries, kThreads>(queries, p.aligned) ||
                            loaded_bad<T, D, Queries, kThreads>(grads, p.aligned));
    } else {
      sync_threads();
    }
    if (step + 1 < steps) load_queries(step + 1, stage ^ 1);
    if (!active) continue;
    const QueryFacts facts = facts_of(stage);
    float s[Queries / 8][4] = {}, ds[Queries / 8][4] = {}, slope[Rich ? Queries / 8 : 1][4];
    multiply_rows<T, D, Queries>(s, operand_of(keys), queries);
    multiply_rows<T, D, Queries>(ds, operand_of(values), grads);
    if constexpr (Rich) {
      scale_scores<T>(p, s, slope);
      if (p.key_bias != nullptr) {
        FXA_UNROLL
        for (int half = 0; half < 2; ++half) {
          const float* biases = key_bias_row(p, {home.load(0), mine.count}, my_key[half]);
          const float bias = biases == nullptr ? 0.0f : load_global(biases + head * p.key_bias_head);
          FXA_UNROLL
          for (int i = 0; i < Queries / 4; ++i) {
            float& x = s[i / 2][2 * half + i % 2];
            x = fused(bias, kUnit<T>, x);
          }
        }
      }
    }
    FXA_UNROLL
    for (int n = 0; n < Queries / 8; ++n) {
      FXA_UNROLL
      for (int c = 0; c < 2; ++c) {
        const int query = column_of(n, c);
        const float lse = facts.lse.load(query), delta = facts.delta.load(query);
        const float inverse = kExact ? facts.inverse.load(query) : 1.0f;
        const Range range = Rich ? Range{facts.start.load(query), facts.end.load(query)} : Range{0, 0};
        FXA_UNROLL
        for (int half = 0; half < 2; ++half) {
          const int e = 2 * half + c;
          const float factor = Rich ? 1.0f : p.scale * kUnit<T>;
          float weight = power<T>(fused(s[n][e], factor, -lse));
          if constexpr (kExact) weight *= inverse;
          float grad = weight * (ds[n][e] - delta);
          if constexpr (Rich) {
            const bool seen = range.sees(my_key[half]);
            weight = seen ? weight : 0.0f;
            grad = seen ? grad : 0.0f;
            grad_bias[half] += grad;
            grad *= seen ? slope[n][e] : 0.0f;
          }
          s[n][e] = weight;
          ds[n][e] = grad;
        }
      }
    }
    if (Rich && bad) {
      const auto sees = [&](int half, int k) {
        return my_key[half] >= facts.start.load(k) && my_key[half] < facts.end.load(k);
      };
      multiply_depth_guarded<T, D, Queries, kColumns>(grad_value, s, grads, bad_rows<T, D, Queries>(grads), sees,
                                                      first_column);
      multiply_depth_guarded<T, D, Queries, kColumns>(grad_key, ds, queries, bad_rows<T, D, Queries>(queries), sees,
                                                      first_column);
    } else {
      multiply_depth<T, D, Queries, kColumns>(grad_value, s, grads, first_column);
      multiply_depth<T, D, Queries, kColumns>(grad_key, ds, queries, first_column);
    }
    if constexpr (Rich) {
      const bool last = step % tiles == tiles - 1;
      if (g.grad_key_bias != nullptr && g.key_bias_has_heads && last) store_bias(head, p.kv_heads * p.group);
    }
  }
  if (!active) return;
  if constexpr (Rich) {
    if (g.grad_key_bias != nullptr && !g.key_bias_has_heads) store_bias(kv_head, p.kv_heads);
  }
  FXA_UNROLL
  for (int half = 0; half < 2; ++half) {
    if (my_key[half] >= first_key + home.load(1)) continue;
    const int64_t place = static_cast<int64_t>(home.load(0) + my_key[half]) * p.kv_heads + kv_head;
    if (g.grad_key != nullptr) {
      store_row(static_cast<T*>(g.grad_key) + place * p.head_dim + first_column, grad_key, half, p.scale,
                p.head_dim - first_column);
    }
    if (g.grad_value != nullptr) {
      store_row(static_cast<T*>(g.grad_value) + place * p.value_dim + first_column, grad_value, half, 1.0f,
                p.value_dim - first_column);
    }
  }
}

}  // namespace fastxattn::attention
