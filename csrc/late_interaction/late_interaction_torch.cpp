// torch operators of late interaction. Schemas live in fastxattn/ops/late_interaction/schema.py.
#include <algorithm>
#include <cstring>
#include <tuple>
#include <vector>

#include "bindings/torch_glue.h"
#include "late_interaction/late_interaction.h"

namespace fastxattn {
namespace {

void check_sets(TokenSets& side, const Tensor& x, const Tensor& cu, const char* name) {
  STD_TORCH_CHECK(x.dim() == 2 && x.is_contiguous(), "fastxattn: ", name, " must be a contiguous (tokens, d) matrix");
  STD_TORCH_CHECK(cu.dim() == 1 && cu.size(0) >= 1 && cu.is_contiguous() && cu.scalar_type() == ScalarType::Int,
                  "fastxattn: cu_seqlens_", name, " must be a contiguous int32 vector of at least one entry");
  side.data = x.const_data_ptr();
  side.cu = static_cast<const int32_t*>(cu.const_data_ptr());
  side.sets = cu.size(0) - 1;
  side.tokens = x.size(0);
  bool ok = side.cu[0] == 0 && side.cu[side.sets] <= side.tokens;
  for (int64_t s = 0; s < side.sets; ++s) ok = ok && side.cu[s] <= side.cu[s + 1];
  STD_TORCH_CHECK(ok, "fastxattn: cu_seqlens_", name, " must start at 0, never decrease and end within the tokens");
}

std::vector<int32_t> group_sets(TokenSets& side) {
  std::vector<int32_t> first{0};
  for (int64_t s = 0; s < side.sets; ++s) {
    const int64_t begin = side.cu[first.back()];
    if (s > first.back() && side.cu[s + 1] - begin > kTokenBlock) first.push_back(static_cast<int32_t>(s));
  }
  if (side.sets > 0) first.push_back(static_cast<int32_t>(side.sets));
  side.groups = static_cast<int64_t>(first.size()) - 1;
  return first;
}

Tensor make(int64_t rows, int64_t columns, ScalarType type, int fill) {
  Tensor t = empty_cpu({rows, columns}, type);
  // An empty tensor's pointer is null, which memset may not be given.
  if (t.numel() > 0) std::memset(t.mutable_data_ptr(), fill, static_cast<size_t>(t.numel()) * 4);
  return t;
}

LateInteractionParams params(const Tensor& a, const Tensor& b, const Tensor& cu_a, const Tensor& cu_b, bool from_a,
                             bool from_b) {
  LateInteractionParams p;
  check_sets(p.a, a, cu_a, "a");
  check_sets(p.b, b, cu_b, "b");
  STD_TORCH_CHECK(a.size(1) == b.size(1) && a.scalar_type() == b.scalar_type(),
                  "fastxattn: a and b must agree in features and dtype");
  p.dtype = dtype_of(a, "a");
  p.d = a.size(1);
  p.from_a = from_a;
  p.from_b = from_b;
  return p;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> maxsim_cpu(const Tensor& a, const Tensor& b, const Tensor& cu_a,
                                                      const Tensor& cu_b, bool from_a, bool from_b) {
  LateInteractionParams p = params(a, b, cu_a, cu_b, from_a, from_b);
  const auto sum = [&](bool needed) { return make(needed ? p.a.sets : 0, p.b.sets, ScalarType::Float, 0); };
  Tensor sum_a = sum(from_a), sum_b = sum(from_b);
  Tensor best_a = make(from_a ? p.a.tokens : 0, p.b.sets, ScalarType::Int, 0xff);
  Tensor best_b = make(from_b ? p.b.tokens : 0, p.a.sets, ScalarType::Int, 0xff);
  p.a.best_sum = static_cast<float*>(sum_a.mutable_data_ptr());
  p.b.best_sum = static_cast<float*>(sum_b.mutable_data_ptr());
  p.a.best = static_cast<int32_t*>(best_a.mutable_data_ptr());
  p.b.best = static_cast<int32_t*>(best_b.mutable_data_ptr());
  const std::vector<int32_t> groups_a = group_sets(p.a), groups_b = group_sets(p.b);
  p.a.group = groups_a.data(), p.b.group = groups_b.data();
  const Parallel parallel = torch_parallel();
  std::vector<char> scratch(static_cast<size_t>(late_interaction_scratch(p) * parallel.workers + 64));
  char* aligned = reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(scratch.data()) + 63) / 64 * 64);
  late_interaction_forward(p, aligned, parallel);
  return {sum_a, sum_b, best_a, best_b};
}

void check_matrix(const Tensor& t, const char* name, int64_t rows, int64_t columns, ScalarType type) {
  STD_TORCH_CHECK(
      t.dim() == 2 && t.size(0) == rows && t.size(1) == columns && t.is_contiguous() && t.scalar_type() == type,
      "fastxattn: ", name, " must be contiguous, of the shape and type the forward pass left");
}

// The matches are read from memory that a caller could have changed; out-of-range ones are dropped.
void check_matches(const Tensor& t, const TokenSets& self, const TokenSets& other) {
  const auto* at = static_cast<const int32_t*>(t.const_data_ptr());
  bool ok = true;
  for (int64_t token = 0; token < self.tokens; ++token) {
    for (int64_t o = 0; o < other.sets; ++o) ok &= at[token * other.sets + o] < other.cu[o + 1] - other.cu[o];
  }
  STD_TORCH_CHECK(ok, "fastxattn: a best match lies outside its set");
}

std::tuple<Tensor, Tensor> maxsim_backward_cpu(const Tensor& grad_a, const Tensor& grad_b, const Tensor& best_a,
                                               const Tensor& best_b, const Tensor& a, const Tensor& b,
                                               const Tensor& cu_a, const Tensor& cu_b, bool from_a, bool from_b,
                                               int64_t needs) {
  LateInteractionParams p = params(a, b, cu_a, cu_b, from_a, from_b);
  if (from_a) {
    check_matrix(grad_a, "grad_a", p.a.sets, p.b.sets, ScalarType::Float);
    check_matrix(best_a, "best_a", p.a.tokens, p.b.sets, ScalarType::Int);
    check_matches(best_a, p.a, p.b);
  }
  if (from_b) {
    check_matrix(grad_b, "grad_b", p.a.sets, p.b.sets, ScalarType::Float);
    check_matrix(best_b, "best_b", p.b.tokens, p.a.sets, ScalarType::Int);
    check_matches(best_b, p.b, p.a);
  }
  p.a.grad = static_cast<const float*>(grad_a.const_data_ptr());
  p.b.grad = static_cast<const float*>(grad_b.const_data_ptr());
  p.a.best = static_cast<int32_t*>(best_a.mutable_data_ptr());
  p.b.best = static_cast<int32_t*>(best_b.mutable_data_ptr());
  Tensor out_a = make(needs & 1 ? p.a.tokens : 0, p.d, ScalarType::Float, 0);
  Tensor out_b = make(needs & 2 ? p.b.tokens : 0, p.d, ScalarType::Float, 0);
  if (needs & 1) p.a.grad_data = static_cast<float*>(out_a.mutable_data_ptr());
  if (needs & 2) p.b.grad_data = static_cast<float*>(out_b.mutable_data_ptr());
  late_interaction_backward(p, torch_parallel());
  return {out_a, out_b};
}

}  // namespace
}  // namespace fastxattn

STABLE_TORCH_LIBRARY_IMPL(fastxattn, CPU, m) {
  m.impl("maxsim_cpu", FXA_OPERATOR(&fastxattn::maxsim_cpu));
  m.impl("maxsim_backward_cpu", FXA_OPERATOR(&fastxattn::maxsim_backward_cpu));
}
