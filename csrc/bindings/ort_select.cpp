// fastxattn::Select for ONNX Runtime: the best tokens of each sequence, in one pass.
#include "bindings/ort_op.h"
#include "pruning/pruning.h"

namespace fastxattn::ort {
namespace {

void compute(Call& call) {
  const View scores = call.input(0), cu = call.input(1), counts = call.input(2), slots = call.input(3);
  scores.expect({-1}, "(total,)");
  const int64_t total = scores.size[0], batch = check_offsets(cu, total);
  counts.expect({batch}, "(batch,)");
  require(slots.rank <= 1 && (slots.rank == 0 || slots.size[0] == 1), "capacity must have one element; got ", slots);
  const int64_t capacity = *slots.as<int64_t>();
  require(capacity >= 0 && capacity <= INT32_MAX, "capacity must be in 0..2^31 - 1; got ", capacity);
  pruning::SelectParams p{};
  p.scores = scores.as<float>();
  p.cu = cu.as<int32_t>();
  if (const View protect = call.input(4)) {
    protect.expect({total}, "(total,)");
    p.protected_tokens = protect.as<uint8_t>();
  }
  auto* keep = static_cast<int32_t*>(call.output(0, {capacity}));
  auto* offsets = static_cast<int32_t*>(call.output(1, {batch + 1}));
  auto* places = static_cast<int32_t*>(call.output(2, {total}));
  int64_t sum = 0;
  offsets[0] = 0;
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t length = p.cu[b + 1] - p.cu[b], needed = counts.as<int32_t>()[b];
    sum += needed < 0 ? 0 : needed < length ? needed : length;
    if (sum > capacity) sum = capacity;
    offsets[b + 1] = static_cast<int32_t>(sum);
  }
  for (int64_t i = sum; i < capacity; ++i) keep[i] = -1;
  for (int64_t i = p.cu[batch]; i < total; ++i) places[i] = -1;
  p.cu_keep = offsets;
  p.keep_index = keep;
  p.assignment = places;
  pruning::select(p, batch, call.parallel());
}

}  // namespace

const Spec& select_spec() {
  static const Spec spec{"Select",
                         {{"scores", Kind::f32},
                          {"cu_seqlens", Kind::i32},
                          {"counts", Kind::i32},
                          {"capacity", Kind::i64},
                          {"protected", Kind::boolean, false}},
                         {{"keep_index", Kind::i32}, {"cu_keep", Kind::i32}, {"assignment", Kind::i32}},
                         {},
                         {},
                         compute};
  return spec;
}

}  // namespace fastxattn::ort
