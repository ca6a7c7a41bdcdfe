// Torch registrations of the pruning kernels. They check what memory safety needs; the rest is checked in Python.
#include <vector>

#include "bindings/torch_glue.h"
#include "core/pages.h"
#include "pruning/pruning.h"

namespace fastxattn::pruning {
namespace {

const int32_t* offsets_of(const Tensor& t, const char* name, int64_t rows) {
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Int && t.dim() == 1 && t.size(0) >= 1 && t.is_contiguous(),
                  "fastxattn: ", name, " must be a contiguous int32 tensor of shape (batch + 1,)");
  const auto* cu = static_cast<const int32_t*>(t.const_data_ptr());
  const int64_t n = t.size(0);
  bool ok = cu[0] == 0 && cu[n - 1] <= rows;
  for (int64_t b = 1; b < n; ++b) ok = ok && cu[b] >= cu[b - 1];
  STD_TORCH_CHECK(ok, "fastxattn: ", name, " must start at 0, not decrease, and end within ", rows, " rows");
  return cu;
}

const int32_t* index_of(const Tensor& t, const char* name, int64_t length, int64_t low, int64_t high) {
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Int && t.dim() == 1 && t.size(0) >= length && t.is_contiguous(),
                  "fastxattn: ", name, " must be a contiguous int32 vector of at least ", length, " entries");
  const auto* index = static_cast<const int32_t*>(t.const_data_ptr());
  bool ok = true;
  for (int64_t i = 0; i < length; ++i) ok = ok & (index[i] >= low) & (index[i] < high);
  STD_TORCH_CHECK(ok, "fastxattn: ", name, " must lie in [", low, ", ", high, ")");
  return index;
}

template <class T>
const T* vector_of(const Tensor& t, const char* name, ScalarType type, int64_t length) {
  STD_TORCH_CHECK(t.scalar_type() == type && t.dim() == 1 && t.size(0) >= length && t.is_contiguous(),
                  "fastxattn: ", name, " must be a contiguous vector of at least ", length,
                  " entries of the right dtype");
  return static_cast<const T*>(t.const_data_ptr());
}

template <class T>
const T* vector_of(const OptionalTensor& t, const char* name, ScalarType type, int64_t length) {
  return t.has_value() ? vector_of<T>(*t, name, type, length) : nullptr;
}

void check_matrix(const Tensor& x) {
  STD_TORCH_CHECK(x.dim() == 2 && x.is_contiguous(), "fastxattn: x must be a contiguous matrix (rows, channels)");
}

// (rows, channels of x), to be written from end to end.
Tensor new_rows(const Tensor& x, int64_t rows) {
  Tensor out = torch::stable::new_empty(x, {rows, x.size(1)});
  ask_for_huge_pages(out.mutable_data_ptr(), rows * x.size(1) * dtype_size(dtype_of(x, "x")));
  return out;
}

Tensor gather_op(const Tensor& x, const Tensor& index, const OptionalTensor& coefficient) {
  check_matrix(x);
  const int64_t rows = index.size(0);
  GatherParams p{};
  p.x = x.const_data_ptr();
  p.index = index_of(index, "index", rows, -1, x.size(0));
  p.coefficient = vector_of<float>(coefficient, "coefficient", ScalarType::Float, rows);
  Tensor out = new_rows(x, rows);
  p.out = out.mutable_data_ptr();
  p.rows = rows;
  p.channels = x.size(1);
  p.dtype = dtype_of(x, "x");
  gather(p, torch_parallel());
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> select_op(const Tensor& scores, const Tensor& cu_seqlens,
                                                     const Tensor& counts, const OptionalTensor& protected_tokens,
                                                     const OptionalTensor& x, int64_t capacity) {
  const int64_t batch = cu_seqlens.size(0) - 1, total = scores.size(0);
  SelectParams p{};
  p.scores = vector_of<float>(scores, "scores", ScalarType::Float, total);
  p.cu = offsets_of(cu_seqlens, "cu_seqlens", total);
  p.protected_tokens = vector_of<uint8_t>(protected_tokens, "protected", ScalarType::Bool, total);
  const int32_t* wanted = vector_of<int32_t>(counts, "counts", ScalarType::Int, batch);
  STD_TORCH_CHECK(capacity >= 0, "fastxattn: capacity must not be negative; got ", capacity);
  Tensor keep_index = torch::stable::new_empty(cu_seqlens, {capacity});
  Tensor cu_keep = torch::stable::new_empty(cu_seqlens, {batch + 1});
  Tensor assignment = torch::stable::new_empty(cu_seqlens, {total});
  auto* keep = static_cast<int32_t*>(keep_index.mutable_data_ptr());
  auto* offsets = static_cast<int32_t*>(cu_keep.mutable_data_ptr());
  auto* places = static_cast<int32_t*>(assignment.mutable_data_ptr());
  int64_t sum = 0;
  offsets[0] = 0;
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t n = p.cu[b + 1] - p.cu[b], k = wanted[b] < 0 ? 0 : (wanted[b] < n ? wanted[b] : n);
    sum = sum + k < capacity ? sum + k : capacity;
    offsets[b + 1] = static_cast<int32_t>(sum);
  }
  for (int64_t i = sum; i < capacity; ++i) keep[i] = -1;
  for (int64_t i = p.cu[batch]; i < total; ++i) places[i] = -1;
  p.cu_keep = offsets;
  p.keep_index = keep;
  p.assignment = places;
  select(p, batch, torch_parallel());
  if (!x.has_value()) return {keep_index, cu_keep, assignment, torch::stable::new_empty(scores, {0})};
  STD_TORCH_CHECK(x->size(0) == total, "fastxattn: x must have the rows of scores, ", total, "; got ", x->size(0));
  return {keep_index, cu_keep, assignment, gather_op(*x, keep_index, std::nullopt)};
}

Tensor merge_op(const Tensor& x, const Tensor& assignment, const OptionalTensor& coefficient, int64_t rows) {
  check_matrix(x);
  STD_TORCH_CHECK(rows >= 0, "fastxattn: rows must not be negative; got ", rows);
  MergeParams p{};
  p.x = x.const_data_ptr();
  p.total = x.size(0);
  p.assignment = index_of(assignment, "assignment", p.total, -1, rows);
  p.coefficient = vector_of<float>(coefficient, "coefficient", ScalarType::Float, p.total);
  Tensor out = new_rows(x, rows);
  p.out = out.mutable_data_ptr();
  p.rows = rows;
  p.channels = x.size(1);
  p.dtype = dtype_of(x, "x");
  merge(p, torch_parallel());
  return out;
}

std::tuple<Tensor, Tensor> match_op(const Tensor& x, const Tensor& a_index, const Tensor& cu_a, const Tensor& b_index,
                                    const Tensor& cu_b) {
  check_matrix(x);
  MatchParams p{};
  p.x = x.const_data_ptr();
  p.batch = cu_a.size(0) - 1;
  STD_TORCH_CHECK(cu_b.size(0) == p.batch + 1, "fastxattn: cu_b must have as many entries as cu_a");
  p.cu_a = offsets_of(cu_a, "cu_a", a_index.size(0));
  p.cu_b = offsets_of(cu_b, "cu_b", b_index.size(0));
  p.a_index = index_of(a_index, "a_index", p.cu_a[p.batch], 0, x.size(0));
  p.b_index = index_of(b_index, "b_index", p.cu_b[p.batch], 0, x.size(0));
  p.channels = x.size(1);
  p.dtype = dtype_of(x, "x");
  Tensor best = torch::stable::new_empty(a_index, {a_index.size(0)});
  Tensor similarity = torch::stable::new_empty(x, {a_index.size(0)}, ScalarType::Float);
  p.best = static_cast<int32_t*>(best.mutable_data_ptr());
  p.similarity = static_cast<float*>(similarity.mutable_data_ptr());
  for (int64_t i = p.cu_a[p.batch]; i < a_index.size(0); ++i) p.best[i] = -1, p.similarity[i] = __builtin_nanf("");
  match(p, torch_parallel());
  return {best, similarity};
}

Tensor greedy_op(const Tensor& x, const OptionalTensor& quality, const Tensor& cu_seqlens, const Tensor& counts,
                 const OptionalTensor& protected_tokens, int64_t mode, int64_t max_count) {
  check_matrix(x);
  const int64_t total = x.size(0);
  STD_TORCH_CHECK(mode == 0 || mode == 1, "fastxattn: mode must be 0 or 1; got ", mode);
  STD_TORCH_CHECK(max_count >= 0, "fastxattn: max_count must not be negative; got ", max_count);
  GreedyParams p{};
  p.max_count = max_count;
  p.x = x.const_data_ptr();
  p.batch = cu_seqlens.size(0) - 1;
  p.cu = offsets_of(cu_seqlens, "cu_seqlens", total);
  p.quality = vector_of<float>(quality, "quality", ScalarType::Float, total);
  p.counts = vector_of<int32_t>(counts, "counts", ScalarType::Int, p.batch);
  p.protected_tokens = vector_of<uint8_t>(protected_tokens, "protected", ScalarType::Bool, total);
  p.channels = x.size(1);
  p.dtype = dtype_of(x, "x");
  p.mode = static_cast<GreedyMode>(mode);
  Tensor scores = torch::stable::new_empty(x, {total}, ScalarType::Float);
  p.scores = static_cast<float*>(scores.mutable_data_ptr());
  for (int64_t i = p.cu[p.batch]; i < total; ++i) p.scores[i] = -__builtin_inff();
  greedy(p, torch_parallel());
  return scores;
}

Tensor quantile_op(const Tensor& scores, const Tensor& cu_seqlens, const Tensor& q) {
  QuantileParams p{};
  p.scores = vector_of<float>(scores, "scores", ScalarType::Float, scores.size(0));
  p.cu = offsets_of(cu_seqlens, "cu_seqlens", scores.size(0));
  p.batch = cu_seqlens.size(0) - 1;
  p.quantiles = q.size(0);
  const float* given = vector_of<float>(q, "q", ScalarType::Float, p.quantiles);
  std::vector<double> wide(given, given + p.quantiles);
  for (double v : wide) STD_TORCH_CHECK(v >= 0 && v <= 1, "fastxattn: q must lie in [0, 1]");
  p.q = wide.data();
  Tensor out = torch::stable::new_empty(scores, {p.batch, p.quantiles});
  p.out = static_cast<float*>(out.mutable_data_ptr());
  quantile(p, torch_parallel());
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastxattn, CPU, m) {
  m.impl("pruning_select_cpu", TORCH_BOX(&select_op));
  m.impl("pruning_gather_cpu", TORCH_BOX(&gather_op));
  m.impl("pruning_merge_cpu", TORCH_BOX(&merge_op));
  m.impl("pruning_match_cpu", TORCH_BOX(&match_op));
  m.impl("pruning_greedy_cpu", TORCH_BOX(&greedy_op));
  m.impl("pruning_quantile_cpu", TORCH_BOX(&quantile_op));
}

}  // namespace fastxattn::pruning
