// torch ops over the CUDA late-interaction kernels. Results are allocated by the caller.
#include "bindings/torch_cuda_glue.h"
#include "late_interaction/late_interaction_cuda.h"

namespace fastxattn {
namespace {

void check_tokens(const Tensor& a, const Tensor& b) {
  STD_TORCH_CHECK(a.dim() == 2 && b.dim() == 2 && a.size(1) == b.size(1) && a.scalar_type() == b.scalar_type(),
                  "fastxattn: a and b must be matrices of one width and dtype");
}

const void* tokens_of(const Tensor& x, const Tensor& beside) {
  return plain_pointer<const void>(x, "tokens", beside.scalar_type(), beside, 0);
}

void maxsim(OptionalTensor sum_a, OptionalTensor sum_b, OptionalTensor best_a, OptionalTensor best_b, Tensor a,
            Tensor b, Tensor cu_a, Tensor cu_b, double smooth, bool aligned) {
  check_tokens(a, b);
  const int64_t n = cu_a.numel() - 1, m = cu_b.numel() - 1;
  const auto kept = smooth > 0 ? ScalarType::Float : ScalarType::Int;
  const auto side = [&](const Tensor& x, const Tensor& cu, const OptionalTensor& sum, const OptionalTensor& best,
                        int64_t others) {
    return TokenSide{tokens_of(x, a),
                     plain_pointer<const int32_t>(cu, "cu_seqlens", ScalarType::Int, a, 1),
                     narrow(cu.numel() - 1, "sets"),
                     narrow(x.size(0), "tokens"),
                     plain_pointer<float>(sum, "sums", ScalarType::Float, a, n * m),
                     plain_pointer<void>(best, "best", kept, a, x.size(0) * others)};
  };
  const LateInteractionCuda p{side(a, cu_a, sum_a, best_a, m), side(b, cu_b, sum_b, best_b, n), a.size(1),
                              static_cast<float>(smooth), aligned};
  check_launch(maxsim_cuda(p, dtype_of(a, "tokens"), stream_of(a)));
}

LateInteractionGradientCuda gradient_params(const Tensor& x, const Tensor& y, const Tensor& cu_x, const Tensor& cu_y,
                                            const Tensor& set_x, const Tensor& set_y, const OptionalTensor& best_x,
                                            const OptionalTensor& best_y, const OptionalTensor& grad_x,
                                            const OptionalTensor& grad_y, int64_t stride_x, int64_t stride_y,
                                            ScalarType kept, bool aligned) {
  check_tokens(x, y);
  const int64_t scores = (cu_x.numel() - 1) * (cu_y.numel() - 1);
  const auto side = [&](const Tensor& own, const Tensor& cu, const Tensor& set, const OptionalTensor& best,
                        const OptionalTensor& grad, int64_t others, int64_t stride) {
    STD_TORCH_CHECK(best.has_value() == grad.has_value(), "fastxattn: best and grad go together");
    return TokenGradientSide{tokens_of(own, x),
                             plain_pointer<const int32_t>(cu, "cu_seqlens", ScalarType::Int, x, 1),
                             plain_pointer<const int32_t>(set, "set", ScalarType::Int, x, own.size(0)),
                             narrow(own.size(0), "tokens"),
                             narrow(cu.numel() - 1, "sets"),
                             plain_pointer<const void>(best, "best", kept, x, own.size(0) * others),
                             plain_pointer<const float>(grad, "grad", ScalarType::Float, x, scores),
                             stride};
  };
  LateInteractionGradientCuda p{};
  p.x = side(x, cu_x, set_x, best_x, grad_x, cu_y.numel() - 1, stride_x);
  p.y = side(y, cu_y, set_y, best_y, grad_y, cu_x.numel() - 1, stride_y);
  const int64_t last = (p.x.sets - 1) * stride_x + (p.y.sets - 1) * stride_y;
  STD_TORCH_CHECK(stride_x >= 0 && stride_y >= 0 && last < scores, "fastxattn: strides must stay inside the scores");
  p.d = x.size(1), p.aligned = aligned;
  return p;
}

void gradient(Tensor out, Tensor x, Tensor y, Tensor cu_x, Tensor cu_y, Tensor set_x, Tensor set_y,
              OptionalTensor best_x, OptionalTensor best_y, OptionalTensor grad_x, OptionalTensor grad_y,
              int64_t stride_x, int64_t stride_y, bool aligned) {
  auto p = gradient_params(x, y, cu_x, cu_y, set_x, set_y, best_x, best_y, grad_x, grad_y, stride_x, stride_y,
                           ScalarType::Int, aligned);
  p.shares = narrow(out.size(0), "shares");
  p.out = plain_pointer<float>(out, "out", ScalarType::Float, x, int64_t{p.shares} * x.numel());
  check_launch(maxsim_gradient_cuda(p, dtype_of(x, "tokens"), stream_of(x)));
}

void weights(Tensor weights, Tensor x, Tensor y, Tensor cu_x, Tensor cu_y, Tensor set_x, Tensor set_y,
             OptionalTensor best_x, OptionalTensor best_y, OptionalTensor grad_x, OptionalTensor grad_y,
             int64_t stride_x, int64_t stride_y, double smooth, int64_t first_x, int64_t first_y, int64_t rows,
             int64_t columns, bool aligned) {
  auto p = gradient_params(x, y, cu_x, cu_y, set_x, set_y, best_x, best_y, grad_x, grad_y, stride_x, stride_y,
                           ScalarType::Float, aligned);
  STD_TORCH_CHECK(first_x >= 0 && first_y >= 0 && first_x + rows <= p.x.tokens && first_y + columns <= p.y.tokens,
                  "fastxattn: the window must lie inside the matrix");
  STD_TORCH_CHECK(weights.dim() == 2 && weights.size(0) >= rows && weights.size(1) >= columns,
                  "fastxattn: weights must hold the window");
  STD_TORCH_CHECK(smooth > 0, "fastxattn: smooth must be positive");
  p.smooth = static_cast<float>(smooth);
  p.first_x = narrow(first_x, "first_x"), p.first_y = narrow(first_y, "first_y");
  p.weights = plain_pointer<float>(weights, "weights", ScalarType::Float, x, 0);
  p.stride_weights = weights.size(1);
  check_launch(smooth_weights_cuda(p, rows, columns, dtype_of(x, "tokens"), stream_of(x)));
}

}  // namespace
}  // namespace fastxattn

#define FXA_GRADIENT                                                                                           \
  "Tensor x, Tensor y, Tensor cu_x, Tensor cu_y, Tensor set_x, Tensor set_y, Tensor? best_x, Tensor? best_y, " \
  "Tensor? grad_x, Tensor? grad_y, int stride_x, int stride_y, "

STABLE_TORCH_LIBRARY_FRAGMENT(fastxattn, m) {
  m.def(
      "maxsim_cuda_launch(Tensor(a!)? sum_a, Tensor(b!)? sum_b, Tensor(c!)? best_a, Tensor(d!)? best_b, Tensor a, "
      "Tensor b, Tensor cu_a, Tensor cu_b, float smooth, bool aligned) -> ()");
  m.def("maxsim_gradient_cuda_launch(Tensor(a!) out, " FXA_GRADIENT "bool aligned) -> ()");
  m.def("smooth_weights_cuda_launch(Tensor(a!) weights, " FXA_GRADIENT
        "float smooth, int first_x, int first_y, int rows, int columns, bool aligned) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(fastxattn, CUDA, m) {
  m.impl("maxsim_cuda_launch", TORCH_BOX(&fastxattn::maxsim));
  m.impl("maxsim_gradient_cuda_launch", TORCH_BOX(&fastxattn::gradient));
  m.impl("smooth_weights_cuda_launch", TORCH_BOX(&fastxattn::weights));
}
