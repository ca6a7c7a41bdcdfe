// Dropout decided by a counter, not by a stream: Philox4x32-10 with the seed as its key and the counter
// (query row, key slot / 4, head, 0); word (key slot % 4) of the result decides. Every backend draws the same mask.
// Salmon, Moraes, Dror, Shaw: Parallel random numbers: as easy as 1, 2, 3 (SC 2011).
#pragma once

#include "attention/attention_softmax.inl"

namespace fastxattn::FXA_ISA {

using vu64 = uint64_t __attribute__((vector_size(W * 8)));

FXA_INLINE void multiply_wide(vu x, uint32_t by, vu& low, vu& high) {
  const vu64 product = __builtin_convertvector(x, vu64) * static_cast<uint64_t>(by);
  low = __builtin_convertvector(product, vu);
  high = __builtin_convertvector(product >> 32, vu);
}

static void philox(vu (&counter)[4], uint64_t seed) {
  uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    vu low0, high0, low1, high1;
    multiply_wide(counter[0], 0xD2511F53u, low0, high0);
    multiply_wide(counter[2], 0xCD9E8D57u, low1, high1);
    counter[0] = high1 ^ counter[1] ^ key0;
    counter[1] = low1;
    counter[2] = high0 ^ counter[3] ^ key1;
    counter[3] = low0;
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
}

// Calls f(key, lane offset, keep mask) for every key of [0, keys) and vector of lanes; key_begin is a multiple of 4.
template <class F>
FXA_INLINE void for_each_kept(const AttentionParams& p, int64_t kv_head, const Lanes& lanes, int64_t key_begin,
                              int64_t keys, F&& f) {
  const vf p_drop = splat(p.dropout_p);
  for (int64_t i = 0; i < lanes.width; i += W) {
    vu row, head;
    for (int k = 0; k < W; ++k) {
      row[k] = static_cast<uint32_t>(lanes.row[i + k]);
      head[k] = static_cast<uint32_t>(kv_head * p.group() + lanes.head[i + k]);
    }
    for (int64_t j = 0; j < keys; j += 4) {
      vu words[4] = {row, vu{} + static_cast<uint32_t>((key_begin + j) / 4), head, vu{}};
      philox(words, p.seed);
      for (int64_t k = 0; k < 4 && j + k < keys; ++k) {
        const vf uniform = __builtin_convertvector(reinterpret_cast<vi>(words[k] >> 8), vf) * splat(0x1p-24f);
        f(j + k, i, uniform >= p_drop);
      }
    }
  }
}

// Zeroes the dropped entries of a tile of weights; the division by (1 - p) is left to the caller.
template <class T>
static void drop_weights(const AttentionParams& p, int64_t kv_head, const Lanes& lanes, int64_t key_begin, int64_t keys,
                         float* weights, int64_t ld) {
  for_each_kept(p, kv_head, lanes, key_begin, keys, [&](int64_t key, int64_t lane, vi keep) {
    float* at = weights + key / Operand<T>::kPair * ld + lane;
    vi mask = keep;
    if constexpr (Operand<T>::kPair == 2)
      mask |= key % 2 ? vi{} + 0x0000ffff : vi{} + static_cast<int32_t>(0xffff0000u);
    store(at, reinterpret_cast<vf>(reinterpret_cast<vi>(load(at)) & mask));
  });
}

}  // namespace fastxattn::FXA_ISA
