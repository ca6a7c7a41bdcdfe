// torch ops over the CUDA pruning kernels. Results are allocated by the caller (fastxattn/ops/pruning/cuda.py).
#include "bindings/torch_cuda_glue.h"
#include "pruning/pruning_cuda.h"

namespace fastxattn {
namespace {

using namespace pruning;

int64_t element_size(const Tensor& t) { return dtype_size(dtype_of(t, "x")); }

void select(Tensor keep_index, Tensor assignment, OptionalTensor gathered, Tensor scores, Tensor cu_seqlens,
            Tensor cu_keep, OptionalTensor protected_tokens, OptionalTensor x, bool aligned, int64_t shares) {
  SelectCuda p{};
  const int64_t total = scores.numel(), capacity = keep_index.numel();
  p.batch = narrow(cu_seqlens.numel() - 1, "batch");
  p.total = narrow(total, "tokens");
  p.capacity = narrow(capacity, "capacity");
  p.select = {
      plain_pointer<const float>(scores, "scores", ScalarType::Float, scores, total),
      plain_pointer<const int32_t>(cu_seqlens, "cu_seqlens", ScalarType::Int, scores, 1),
      plain_pointer<const int32_t>(cu_keep, "cu_keep", ScalarType::Int, scores, cu_seqlens.numel()),
      plain_pointer<const uint8_t>(protected_tokens, "protected", ScalarType::Byte, scores, total),
      plain_pointer<int32_t>(keep_index, "keep_index", ScalarType::Int, scores, capacity),
      plain_pointer<int32_t>(assignment, "assignment", ScalarType::Int, scores, total),
  };
  if (x.has_value()) {
    STD_TORCH_CHECK(gathered.has_value() && x->dim() == 2 && x->size(0) >= total,
                    "fastxattn: x must have a row for every score, and gathered must be there with it");
    p.row_bytes = x->size(1) * element_size(*x);
    p.x = plain_pointer<const void>(x, "x", x->scalar_type(), scores, 0);
    p.gathered = plain_pointer<void>(gathered, "gathered", x->scalar_type(), scores, capacity * x->size(1));
  }
  p.aligned = aligned;
  check_launch(select_cuda(p, narrow(shares, "shares"), stream_of(scores)));
}

void match(Tensor best, Tensor similarity, Tensor x, Tensor inverse_norm, Tensor a_index, Tensor cu_a, Tensor b_index,
           Tensor cu_b, bool aligned, int64_t shares) {
  STD_TORCH_CHECK(x.dim() == 2, "fastxattn: x must have the shape (rows, channels)");
  MatchCuda p{};
  p.match.dtype = dtype_of(x, "x");
  p.match.x = plain_pointer<const void>(x, "x", x.scalar_type(), x, 0);
  p.match.channels = x.size(1);
  p.match.batch = cu_a.numel() - 1;
  p.match.a_index = plain_pointer<const int32_t>(a_index, "a_index", ScalarType::Int, x, 0);
  p.match.b_index = plain_pointer<const int32_t>(b_index, "b_index", ScalarType::Int, x, 0);
  p.match.cu_a = plain_pointer<const int32_t>(cu_a, "cu_a", ScalarType::Int, x, 1);
  p.match.cu_b = plain_pointer<const int32_t>(cu_b, "cu_b", ScalarType::Int, x, cu_a.numel());
  p.match.best = plain_pointer<int32_t>(best, "best", ScalarType::Int, x, a_index.numel());
  p.match.similarity = plain_pointer<float>(similarity, "similarity", ScalarType::Float, x, a_index.numel());
  p.inverse_norm = plain_pointer<const float>(inverse_norm, "inverse_norm", ScalarType::Float, x, x.size(0));
  p.rows = narrow(x.size(0), "rows");
  p.rows_a = narrow(a_index.numel(), "rows of A");
  p.rows_b = narrow(b_index.numel(), "rows of B");
  p.aligned = aligned;
  check_launch(match_cuda(p, narrow(shares, "shares"), stream_of(x)));
}

void merge(Tensor out, Tensor x, Tensor members, Tensor first, OptionalTensor coefficient) {
  STD_TORCH_CHECK(x.dim() == 2 && out.dim() == 2 && out.size(1) == x.size(1),
                  "fastxattn: x and out must have the shapes (total, channels) and (rows, channels)");
  const MergeCuda p{
      plain_pointer<const void>(x, "x", x.scalar_type(), x, 0),
      plain_pointer<const int64_t>(members, "members", ScalarType::Long, x, x.size(0)),
      plain_pointer<const int64_t>(first, "first", ScalarType::Long, x, out.size(0) + 1),
      plain_pointer<const float>(coefficient, "coefficient", ScalarType::Float, x, x.size(0)),
      plain_pointer<void>(out, "out", x.scalar_type(), x, 0),
      x.size(1),
      x.size(0),
  };
  check_launch(merge_cuda(p, out.size(0), dtype_of(x, "x"), stream_of(x)));
}

}  // namespace
}  // namespace fastxattn

// Below the operators that users and compilers see: these write into what they are given.
STABLE_TORCH_LIBRARY_FRAGMENT(fastxattn, m) {
  m.def(
      "pruning_select_cuda_launch(Tensor(a!) keep_index, Tensor(b!) assignment, Tensor(c!)? gathered, Tensor scores, "
      "Tensor cu_seqlens, Tensor cu_keep, Tensor? protected, Tensor? x, bool aligned, int shares) -> ()");
  m.def(
      "pruning_match_cuda_launch(Tensor(a!) best, Tensor(b!) similarity, Tensor x, Tensor inverse_norm, "
      "Tensor a_index, Tensor cu_a, Tensor b_index, Tensor cu_b, bool aligned, int shares) -> ()");
  m.def("pruning_merge_cuda_launch(Tensor(a!) out, Tensor x, Tensor members, Tensor first, Tensor? coefficient) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(fastxattn, CUDA, m) {
  m.impl("pruning_select_cuda_launch", TORCH_BOX(&fastxattn::select));
  m.impl("pruning_match_cuda_launch", TORCH_BOX(&fastxattn::match));
  m.impl("pruning_merge_cuda_launch", TORCH_BOX(&fastxattn::merge));
}
