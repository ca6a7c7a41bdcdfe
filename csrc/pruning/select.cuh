// Segmented stable top-k with compaction and gather, one launch: a radix search over 32-bit keys that order as scores.
//
// A block reads its sequence's scores once, into shared memory; four passes over the keys find the last one taken, and
// ballots give every kept token its place in ascending order.
#pragma once

#include "core/cuda/tile.cuh"
#include "pruning/pruning_cuda.h"

namespace fastxattn::gpu {

// Unsigned integers that order as scores do: NaN lowest, -0 and 0 equal.
FXA_DEVICE uint32_t order_key(float score) {
  if (score != score) return 0;
  const uint32_t bits = bits_of(score + 0.0f);
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}

FXA_DEVICE void copy_row(const void* from, void* to, int64_t bytes, bool aligned) {
  if (aligned) {
    for (int64_t i = lane_index(); i < bytes / 16; i += 32) {
      store_global(static_cast<U4*>(to) + i, load_global(static_cast<const U4*>(from) + i));
    }
  } else {
    for (int64_t i = lane_index(); i < bytes / 2; i += 32) {
      store_global(static_cast<uint16_t*>(to) + i, load_global(static_cast<const uint16_t*>(from) + i));
    }
  }
}

FXA_DEVICE void zero_row(void* to, int64_t bytes) {
  for (int64_t i = lane_index(); i < bytes / 2; i += 32) store_global(static_cast<uint16_t*>(to) + i, uint16_t{0});
}

FXA_KERNEL(pruning::kSelectThreads, 4)
select_kernel(FXA_PARAMS pruning::SelectCuda p) {
  constexpr int kThreads = pruning::kSelectThreads, kWarps = kThreads / 32;
  const pruning::SelectParams& s = p.select;
  const int t = thread_index(), lane = lane_index(), warp = warp_index();
  const int b = block_index(), share = block_index_y(), shares = grid_blocks_y();
  const bool gathers = p.gathered != nullptr;

  if (b == p.batch) {  // what belongs to no sequence
    const int kept = minimum(maximum(load_global(s.cu_keep + p.batch), 0), p.capacity);
    const int tokens = minimum(maximum(load_global(s.cu + p.batch), 0), p.total);
    for (int j = kept + share * kWarps + warp; j < p.capacity; j += shares * kWarps) {
      if (lane == 0) store_global(s.keep_index + j, -1);
      if (gathers) zero_row(static_cast<char*>(p.gathered) + j * p.row_bytes, p.row_bytes);
    }
    for (int i = tokens + share * kThreads + t; i < p.total; i += shares * kThreads) {
      store_global(s.assignment + i, -1);
    }
    return;
  }

  const Shared<uint32_t> keys = shared_memory<uint32_t>(0);
  const Shared<int> histogram = shared_memory<int>(pruning::kCachedKeys * 4);
  const Shared<int> totals = shared_memory<int>(pruning::kCachedKeys * 4 + 256 * 4);  // [2][kWarps], then the choice
  const Shared<int> chosen = totals.at(32);
  const Shared<int> rows = totals.at(64);  // of the tokens kept among the latest kThreads

  const Segment tokens_of(s.cu, b, p.total), places_of(s.cu_keep, b, p.capacity);
  const int begin = tokens_of.begin, n = tokens_of.count(), first = places_of.begin;
  int needed = minimum(places_of.count(), n);

  const auto guarded = [&](int i) {
    return s.protected_tokens != nullptr && load_global(s.protected_tokens + begin + i) != 0;
  };
  int guards = 0;
  for (int i = t; i < n; i += kThreads) {
    if (i < pruning::kCachedKeys) keys.store(i, order_key(load_global(s.scores + begin + i)));
    guards += guarded(i);
  }
  const auto key_at = [&](int i) {
    return i < pruning::kCachedKeys ? keys.load(i) : order_key(load_global(s.scores + begin + i));
  };

  bool keep_guarded = false;  // every protected token stays, and the others compete for the rest
  if (s.protected_tokens != nullptr) {
    for (int m = 16; m > 0; m /= 2) guards += shuffle_xor(guards, m);
    if (lane == 0) totals.store(warp, guards);
    sync_threads();
    guards = 0;
    for (int w = 0; w < kWarps; ++w) guards += totals.load(w);
    keep_guarded = needed >= guards;
    if (keep_guarded) needed -= guards;
    sync_threads();
  }
  const auto competes = [&](int i) { return s.protected_tokens == nullptr || guarded(i) != keep_guarded; };

  // The key of the last token taken, and how many tokens with exactly this key are: digit by digit from the top.
  uint32_t cut = 0xffffffffu, mask = 0;
  int equals = 0;
  if (needed > 0) {
    cut = 0;
    for (int shift = 24; shift >= 0; shift -= 8) {
      histogram.store(t, 0);
      sync_threads();
      for (int i = t; i < n; i += kThreads) {
        const uint32_t key = key_at(i);
        if ((key & mask) == cut && competes(i)) atomic_add(histogram, static_cast<int>(key >> shift & 255u), 1);
      }
      sync_threads();
      // Thread t holds digit 255 - t: an inclusive scan counts the keys with its digit or a higher one.
      const int here = histogram.load(255 - t);
      int above = here;
      for (int d = 1; d < 32; d *= 2) {
        const int other = shuffle_up(above, d);
        if (lane >= d) above += other;
      }
      if (lane == 31) totals.store(warp, above);
      sync_threads();
      for (int w = 0; w < warp; ++w) above += totals.load(w);
      if (above >= needed && above - here < needed) {
        chosen.store(0, 255 - t);
        chosen.store(1, needed - (above - here));
      }
      sync_threads();
      cut |= static_cast<uint32_t>(chosen.load(0)) << shift;
      mask |= 255u << shift;
      needed = chosen.load(1);
    }
    equals = needed;
  }

  int sure_before = 0, equal_before = 0;  // tokens above the cut, and at it, in earlier rounds
  int buffer = 0;
  for (int base = 0; base < n; base += kThreads, buffer ^= 1) {
    const int i = base + t;
    bool sure = false, equal = false;
    if (i < n) {
      const bool runs = competes(i);
      const uint32_t key = key_at(i);
      sure = runs ? key > cut : keep_guarded;
      equal = runs && key == cut && equals > 0;
    }
    const uint32_t sure_lanes = ballot(sure), equal_lanes = ballot(equal), below = (1u << lane) - 1;
    if (lane == 0) totals.store(buffer * kWarps + warp, popcount(sure_lanes) | popcount(equal_lanes) << 16);
    sync_threads();
    int before = 0, all_here = 0;
    for (int w = 0; w < kWarps; ++w) {
      const int count = totals.load(buffer * kWarps + w);
      before += w < warp ? count : 0;
      all_here += count;
    }
    const int equal_rank = equal_before + (before >> 16) + popcount(equal_lanes & below);
    const bool keep = sure || (equal && equal_rank < equals);
    const int round = sure_before + minimum(equal_before, equals);  // kept in earlier rounds
    const int place = sure_before + (before & 0xffff) + popcount(sure_lanes & below) + minimum(equal_rank, equals);
    if (share == 0 && i < n) {
      store_global(s.assignment + begin + i, keep ? first + place : -1);
      if (keep) store_global(s.keep_index + first + place, begin + i);
    }
    sure_before += all_here & 0xffff;
    equal_before += all_here >> 16;
    if (gathers) {
      if (keep) rows.store(place - round, begin + i);
      sync_threads();
      const int kept = sure_before + minimum(equal_before, equals) - round;
      for (int j = warp; j < kept; j += kWarps) {
        if ((round + j) % shares != share) continue;
        const int64_t from = rows.load(j), to = first + round + j;
        copy_row(static_cast<const char*>(p.x) + from * p.row_bytes, static_cast<char*>(p.gathered) + to * p.row_bytes,
                 p.row_bytes, p.aligned);
      }
    }
  }
}

}  // namespace fastxattn::gpu
