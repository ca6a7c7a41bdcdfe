// Torch registrations of the pruning kernels. They check what memory safety needs; the rest is checked in Python.
#include <vector>

#include "bindings/torch_glue.h"
#include "core/cpu/pages.h"
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

int64_t length_of(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.dim() == 1, "fastxattn: ", name, " must have 1 dimension; got ", t.dim());
  return t.size(0);
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

// A number of rows that int32 indices can name: nothing is allocated for more.
void check_count(int64_t count, const char* name) {
  STD_TORCH_CHECK(count >= 0 && count <= INT32_MAX, "fastxattn: ", name, " must be in 0..2^31 - 1; got ", count);
}

void check_matrix(const Tensor& x) {
  STD_TORCH_CHECK(x.dim() == 2 && x.is_contiguous(), "fastxattn: x must be a contiguous matrix (rows, channels)");
}

// (rows, channels of x), to be written from end to end.
Tensor new_rows(const Tensor& x, int64_t rows) {
  Tensor out = empty_cpu({rows, x.size(1)}, x.scalar_type());
  ask_for_huge_pages(out.mutable_data_ptr(), rows * x.size(1) * dtype_size(dtype_of(x, "x")));
  return out;
}

Tensor gather_op(const Tensor& x, const Tensor& index, const OptionalTensor& coefficient) {
  check_matrix(x);
  const int64_t rows = length_of(index, "index");
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
  const int64_t batch = length_of(cu_seqlens, "cu_seqlens") - 1, total = length_of(scores, "scores");
  SelectParams p{};
  p.scores = vector_of<float>(scores, "scores", ScalarType::Float, total);
  p.cu = offsets_of(cu_seqlens, "cu_seqlens", total);
  p.protected_tokens = vector_of<uint8_t>(protected_tokens, "protected", ScalarType::Bool, total);
  const int32_t* needed = vector_of<int32_t>(counts, "counts", ScalarType::Int, batch);
  check_count(capacity, "capacity");
  if (x.has_value()) {
    check_matrix(*x);
    STD_TORCH_CHECK(x->size(0) == total, "fastxattn: x must have the rows of scores, ", total, "; got ", x->size(0));
  }
  Tensor keep_index = empty_cpu({capacity}, ScalarType::Int);
  Tensor cu_keep = empty_cpu({batch + 1}, ScalarType::Int);
  Tensor assignment = empty_cpu({total}, ScalarType::Int);
  auto* keep = static_cast<int32_t*>(keep_index.mutable_data_ptr());
  auto* offsets = static_cast<int32_t*>(cu_keep.mutable_data_ptr());
  auto* places = static_cast<int32_t*>(assignment.mutable_data_ptr());
  int64_t sum = 0;
  offsets[0] = 0;
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t n = p.cu[b + 1] - p.cu[b], k = needed[b] < 0 ? 0 : (needed[b] < n ? needed[b] : n);
    sum = sum + k < capacity ? sum + k : capacity;
    offsets[b + 1] = static_cast<int32_t>(sum);
  }
  for (int64_t i = sum; i < capacity; ++i) keep[i] = -1;
  for (int64_t i = p.cu[batch]; i < total; ++i) places[i] = -1;
  p.cu_keep = offsets;
  p.keep_index = keep;
  p.assignment = places;
  select(p, batch, torch_parallel());
  if (!x.has_value()) return {keep_index, cu_keep, assignment, empty_cpu({0}, ScalarType::Float)};
  return {keep_index, cu_keep, assignment, gather_op(*x, keep_index, std::nullopt)};
}

Tensor merge_op(const Tensor& x, const Tensor& assignment, const OptionalTensor& coefficient, int64_t rows) {
  check_matrix(x);
  check_count(rows, "rows");
  check_count(x.size(0), "the rows of x");
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
  p.batch = length_of(cu_a, "cu_a") - 1;
  STD_TORCH_CHECK(length_of(cu_b, "cu_b") == p.batch + 1, "fastxattn: cu_b must have as many entries as cu_a");
  const int64_t count = length_of(a_index, "a_index");
  p.cu_a = offsets_of(cu_a, "cu_a", count);
  p.cu_b = offsets_of(cu_b, "cu_b", length_of(b_index, "b_index"));
  p.a_index = index_of(a_index, "a_index", p.cu_a[p.batch], 0, x.size(0));
  p.b_index = index_of(b_index, "b_index", p.cu_b[p.batch], 0, x.size(0));
  p.channels = x.size(1);
  p.dtype = dtype_of(x, "x");
  Tensor best = empty_cpu({count}, ScalarType::Int);
  Tensor similarity = empty_cpu({count}, ScalarType::Float);
  p.best = static_cast<int32_t*>(best.mutable_data_ptr());
  p.similarity = static_cast<float*>(similarity.mutable_data_ptr());
  for (int64_t i = p.cu_a[p.batch]; i < count; ++i) p.best[i] = -1, p.similarity[i] = __builtin_nanf("");
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
  p.batch = length_of(cu_seqlens, "cu_seqlens") - 1;
  p.cu = offsets_of(cu_seqlens, "cu_seqlens", total);
  p.quality = vector_of<float>(quality, "quality", ScalarType::Float, total);
  p.counts = vector_of<int32_t>(counts, "counts", ScalarType::Int, p.batch);
  p.protected_tokens = vector_of<uint8_t>(protected_tokens, "protected", ScalarType::Bool, total);
  p.channels = x.size(1);
  p.dtype = dtype_of(x, "x");
  p.mode = static_cast<GreedyMode>(mode);
  Tensor scores = empty_cpu({total}, ScalarType::Float);
  p.scores = static_cast<float*>(scores.mutable_data_ptr());
  for (int64_t i = p.cu[p.batch]; i < total; ++i) p.scores[i] = -__builtin_inff();
  greedy(p, torch_parallel());
  return scores;
}

Tensor quantile_op(const Tensor& scores, const Tensor& cu_seqlens, const Tensor& q) {
  QuantileParams p{};
  const int64_t total = length_of(scores, "scores");
  p.scores = vector_of<float>(scores, "scores", ScalarType::Float, total);
  p.cu = offsets_of(cu_seqlens, "cu_seqlens", total);
  p.batch = length_of(cu_seqlens, "cu_seqlens") - 1;
  p.quantiles = length_of(q, "q");
  const float* given = vector_of<float>(q, "q", ScalarType::Float, p.quantiles);
  std::vector<double> wide(given, given + p.quantiles);
  for (double v : wide) STD_TORCH_CHECK(v >= 0 && v <= 1, "fastxattn: q must lie in [0, 1]");
  p.q = wide.data();
  Tensor out = empty_cpu({p.batch, p.quantiles}, ScalarType::Float);
  p.out = static_cast<float*>(out.mutable_data_ptr());
  quantile(p, torch_parallel());
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastxattn, CPU, m) {
  m.impl("pruning_select_cpu", FXA_OPERATOR(&select_op));
  m.impl("pruning_gather_cpu", FXA_OPERATOR(&gather_op));
  m.impl("pruning_merge_cpu", FXA_OPERATOR(&merge_op));
  m.impl("pruning_match_cpu", FXA_OPERATOR(&match_op));
  m.impl("pruning_greedy_cpu", FXA_OPERATOR(&greedy_op));
  m.impl("pruning_quantile_cpu", FXA_OPERATOR(&quantile_op));
}

}  // namespace fastxattn::pruning
