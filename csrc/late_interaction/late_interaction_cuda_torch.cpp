// The torch op over the CUDA late-interaction kernel. Results are allocated by the caller.
#include "bindings/torch_cuda_glue.h"
#include "late_interaction/late_interaction_cuda.h"

namespace fastxattn {
namespace {

void maxsim(OptionalTensor sum_a, OptionalTensor sum_b, OptionalTensor best_a, OptionalTensor best_b, Tensor a,
            Tensor b, Tensor cu_a, Tensor cu_b, bool aligned) {
  STD_TORCH_CHECK(a.dim() == 2 && b.dim() == 2 && a.size(1) == b.size(1) && a.scalar_type() == b.scalar_type(),
                  "fastxattn: a and b must be matrices of one width and dtype");
  const int64_t n = cu_a.numel() - 1, m = cu_b.numel() - 1;
  const auto side = [&](const Tensor& x, const Tensor& cu, const OptionalTensor& sum, const OptionalTensor& best,
                        int64_t others) {
    return TokenSide{plain_pointer<const void>(x, "tokens", a.scalar_type(), a, 0),
                     plain_pointer<const int32_t>(cu, "cu_seqlens", ScalarType::Int, a, 1),
                     narrow(cu.numel() - 1, "sets"), plain_pointer<float>(sum, "sums", ScalarType::Float, a, n * m),
                     plain_pointer<int32_t>(best, "best", ScalarType::Int, a, x.size(0) * others)};
  };
  const LateInteractionCuda p{side(a, cu_a, sum_a, best_a, m), side(b, cu_b, sum_b, best_b, n), a.size(1), aligned};
  check_launch(maxsim_cuda(p, dtype_of(a, "tokens"), stream_of(a)));
}

}  // namespace
}  // namespace fastxattn

STABLE_TORCH_LIBRARY_FRAGMENT(fastxattn, m) {
  m.def(
      "maxsim_cuda_launch(Tensor(a!)? sum_a, Tensor(b!)? sum_b, Tensor(c!)? best_a, Tensor(d!)? best_b, Tensor a, "
      "Tensor b, Tensor cu_a, Tensor cu_b, bool aligned) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(fastxattn, CUDA, m) { m.impl("maxsim_cuda_launch", TORCH_BOX(&fastxattn::maxsim)); }
