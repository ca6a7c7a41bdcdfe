// torch ops over the CUDA contrastive kernels. Results are allocated by the caller.
#include "bindings/torch_cuda_glue.h"
#include "contrastive/contrastive_cuda.h"

namespace fastxattn {
namespace {

ContrastiveCudaSide make_side(const Tensor& x, const OptionalTensor& norm, const OptionalTensor& id,
                              const OptionalTensor& skip, const OptionalTensor& limit, const OptionalTensor& slopes) {
  STD_TORCH_CHECK(x.is_cuda() && x.dim() == 2 && (x.size(1) <= 1 || x.stride(1) == 1),
                  "fastxattn: features must be a matrix on a GPU, contiguous in its last axis");
  const int64_t n = x.size(0);
  return {x.const_data_ptr(),
          x.stride(0),
          narrow(n, "rows"),
          plain_pointer<const float>(norm, "norm", ScalarType::Float, x, n),
          plain_pointer<const int32_t>(id, "ids", ScalarType::Int, x, n),
          plain_pointer<const int32_t>(skip, "skip ids", ScalarType::Int, x, n),
          plain_pointer<const float>(limit, "limit", ScalarType::Float, x, n),
          plain_pointer<const float>(slopes, "slopes", ScalarType::Float, x, kContrastiveSlopePlanes * n)};
}

ContrastiveCuda make_params(const ContrastiveCudaSide& x, const ContrastiveCudaSide& y, const Tensor& first,
                            const Tensor& scale, const OptionalTensor& bias, const OptionalTensor& exact,
                            bool exact_by_row, bool exclude_self, bool aligned) {
  ContrastiveCuda p{};
  p.x = x, p.y = y;
  p.d = first.size(1);
  p.scale = plain_pointer<const float>(scale, "scale", ScalarType::Float, first, 1);
  p.bias = plain_pointer<const float>(bias, "bias", ScalarType::Float, first, 1);
  p.exact = plain_pointer<const float>(exact, "exact", ScalarType::Float, first, exact_by_row ? x.rows : y.rows);
  p.exact_by_row = exact_by_row, p.exclude_self = exclude_self, p.aligned = aligned;
  return p;
}

void stats(Tensor state, Tensor x, Tensor y, Tensor scale, OptionalTensor bias, OptionalTensor norm_x,
           OptionalTensor norm_y, Tensor id_x, Tensor id_y, OptionalTensor skip_x, OptionalTensor skip_y,
           OptionalTensor exact, OptionalTensor limit, OptionalTensor rank, bool exact_by_row, bool exclude_self,
           bool means, bool aligned) {
  ContrastiveCuda p =
      make_params(make_side(x, norm_x, id_x, skip_x, limit, {}), make_side(y, norm_y, id_y, skip_y, {}, {}), x, scale,
                  bias, exact, exact_by_row, exclude_self, aligned);
  p.means = means;
  p.rank = plain_pointer<const float>(rank, "rank", ScalarType::Float, x, p.x.rows);
  p.splits = narrow(state.size(0), "splits");
  p.state = plain_pointer<float>(state, "state", ScalarType::Float, x,
                                 int64_t{p.splits} * kContrastiveStatePlanes * p.x.rows);
  check_launch(contrastive_stats_cuda(p, dtype_of(x, "features"), stream_of(x)));
}

void positives(Tensor logits, Tensor x, Tensor y, Tensor scale, OptionalTensor bias, OptionalTensor norm_x,
               OptionalTensor norm_y, Tensor target, bool aligned) {
  ContrastiveCuda p = make_params(make_side(x, norm_x, target, {}, {}, {}), make_side(y, norm_y, {}, {}, {}, {}), x,
                                  scale, bias, {}, true, false, aligned);
  p.target = p.x.id;
  p.logits = plain_pointer<float>(logits, "logits", ScalarType::Float, x, p.x.rows);
  check_launch(contrastive_positives_cuda(p, dtype_of(x, "features"), stream_of(x)));
}

// The window that starts at (first_x, first_y), its slopes and `kinds` sums over its rows.
void set_window(ContrastiveCuda& p, const Tensor& x, const OptionalTensor& dz, const Tensor& sums, int64_t kinds,
                int64_t first_x, int64_t first_y, int64_t rows, int64_t columns) {
  STD_TORCH_CHECK(first_x >= 0 && first_y >= 0 && first_x + rows <= p.x.rows && first_y + columns <= p.y.rows,
                  "fastxattn: the window must lie inside the matrix");
  p.first_x = narrow(first_x, "first_x"), p.first_y = narrow(first_y, "first_y");
  const int64_t parts = (columns + 63) / 64;
  STD_TORCH_CHECK(sums.dim() == 3 && sums.size(0) == kinds && sums.size(1) == parts && sums.size(2) >= rows,
                  "fastxattn: sums must have a row per column tile and a column per row");
  p.stride_sums = sums.size(2);
  p.sums = plain_pointer<float>(sums, "sums", ScalarType::Float, x, 0);
  if (dz.has_value()) {
    STD_TORCH_CHECK(dz->dim() == 2 && dz->size(0) >= rows && dz->size(1) >= columns,
                    "fastxattn: dz must hold the window");
    p.stride_dz = dz->size(1);
  }
  p.dz = plain_pointer<float>(dz, "dz", ScalarType::Float, x, 0);
}

void slopes(OptionalTensor dz, Tensor sums, Tensor x, Tensor y, Tensor scale, OptionalTensor bias,
            OptionalTensor norm_x, OptionalTensor norm_y, Tensor id_x, Tensor id_y, OptionalTensor skip_x,
            OptionalTensor skip_y, OptionalTensor exact, OptionalTensor limit_x, OptionalTensor limit_y,
            OptionalTensor slopes_x, OptionalTensor slopes_y, bool exclude_self, int64_t first_x, int64_t first_y,
            int64_t rows, int64_t columns, bool aligned) {
  ContrastiveCuda p = make_params(make_side(x, norm_x, id_x, skip_x, limit_x, slopes_x),
                                  make_side(y, norm_y, id_y, skip_y, limit_y, slopes_y), x, scale, bias, exact, true,
                                  exclude_self, aligned);
  set_window(p, x, dz, sums, 1, first_x, first_y, rows, columns);
  check_launch(contrastive_slopes_cuda(p, rows, columns, dtype_of(x, "features"), stream_of(x)));
}

void sigmoid(OptionalTensor dz, Tensor sums, Tensor x, Tensor y, Tensor scale, OptionalTensor bias,
             OptionalTensor norm_x, OptionalTensor norm_y, Tensor id_x, Tensor id_y, OptionalTensor skip_x,
             OptionalTensor skip_y, OptionalTensor exact, OptionalTensor weight, bool exclude_self, int64_t first_x,
             int64_t first_y, int64_t rows, int64_t columns, bool aligned) {
  ContrastiveCuda p =
      make_params(make_side(x, norm_x, id_x, skip_x, {}, {}), make_side(y, norm_y, id_y, skip_y, {}, {}), x, scale,
                  bias, exact, true, exclude_self, aligned);
  p.weight = plain_pointer<const float>(weight, "weight", ScalarType::Float, x, p.x.rows);
  set_window(p, x, dz, sums, 3, first_x, first_y, rows, columns);
  check_launch(sigmoid_cuda(p, rows, columns, dtype_of(x, "features"), stream_of(x)));
}

}  // namespace
}  // namespace fastxattn

#define FXA_SIDES                                                                                              \
  "Tensor x, Tensor y, Tensor scale, Tensor? bias, Tensor? norm_x, Tensor? norm_y, Tensor id_x, Tensor id_y, " \
  "Tensor? skip_x, Tensor? skip_y, Tensor? exact, "

STABLE_TORCH_LIBRARY_FRAGMENT(fastxattn, m) {
  m.def("contrastive_stats_cuda_launch(Tensor(a!) state, " FXA_SIDES
        "Tensor? limit, Tensor? rank, bool exact_by_row, bool exclude_self, bool means, bool aligned) -> ()");
  m.def(
      "contrastive_positives_cuda_launch(Tensor(a!) logits, Tensor x, Tensor y, Tensor scale, Tensor? bias, "
      "Tensor? norm_x, Tensor? norm_y, Tensor target, bool aligned) -> ()");
  m.def("contrastive_slopes_cuda_launch(Tensor(a!)? dz, Tensor(b!) sums, " FXA_SIDES
        "Tensor? limit_x, Tensor? limit_y, Tensor? slopes_x, Tensor? slopes_y, bool exclude_self, int first_x, "
        "int first_y, int rows, int columns, bool aligned) -> ()");
  m.def("sigmoid_cuda_launch(Tensor(a!)? dz, Tensor(b!) sums, " FXA_SIDES
        "Tensor? weight, bool exclude_self, int first_x, int first_y, int rows, int columns, bool aligned) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(fastxattn, CUDA, m) {
  m.impl("contrastive_stats_cuda_launch", TORCH_BOX(&fastxattn::stats));
  m.impl("contrastive_positives_cuda_launch", TORCH_BOX(&fastxattn::positives));
  m.impl("contrastive_slopes_cuda_launch", TORCH_BOX(&fastxattn::slopes));
  m.impl("sigmoid_cuda_launch", TORCH_BOX(&fastxattn::sigmoid));
}
