// _fastxattn_native: the torch-free cores for tests. NumPy arrays in, a forced instruction set, NumPy arrays out;
// bfloat16 and float16 travel as uint16. Runs under AddressSanitizer, where libtorch would be in the way.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cstring>
#include <string>
#include <thread>
#include <vector>

#include "attention/attention_arguments.h"
#include "attention/attention_check.h"

namespace py = pybind11;

namespace fastxattn {
namespace {

// Plain threads stand in for a host's pool.
Parallel threads(int64_t count) {
  Parallel parallel;
  parallel.workers = count;
  parallel.run = [](void*, int64_t workers, Parallel::Body body, void* context) {
    std::vector<std::jthread> pool;  // joins
    for (int64_t i = 0; i < workers; ++i) pool.emplace_back(body, i, context);
  };
  return parallel;
}

Isa isa_of(const std::string& name) {
  if (!force_isa(name.c_str())) throw py::value_error("instruction set not available here: " + name);
  return active_isa();
}

ElementType type_of(const std::string& name) {
  if (name == "float32") return ElementType::f32;
  if (name == "bfloat16") return ElementType::bf16;
  if (name == "float16") return ElementType::f16;
  throw py::value_error("unknown dtype: " + name);
}

int64_t elements_per(const py::array& a, int axis) { return a.strides(axis) / a.itemsize(); }

View view_of(const py::array& a, const char* name, ElementType type) {
  View view;
  view.name = name;
  view.data = a.data();
  view.present = true;
  view.type = type;
  view.rank = static_cast<int>(a.ndim());
  require(view.rank <= View::kMaxRank, name, " has too many axes: ", view.rank);
  for (int i = 0; i < view.rank; ++i) view.size[i] = a.shape(i), view.stride[i] = elements_per(a, i);
  return view;
}

// An optional keyword's array of T, which is used as it is.
template <class T>
View optional_view(const py::dict& options, const char* name, ElementType type) {
  if (!options.contains(name)) return {};
  const auto array = py::cast<py::array>(options[name]);
  require(py::isinstance<py::array_t<T>>(array), name, " must be ", type);
  return view_of(array, name, type);
}

AttentionParams params(const py::array& query, const py::array& key, const py::array& value, const py::dict& options,
                       AttentionContent& content) {
  const ElementType type = type_of(py::cast<std::string>(options["dtype"]));
  AttentionArguments a;
  a.query = view_of(query, "query", type), a.key = view_of(key, "key", type), a.value = view_of(value, "value", type);
  using i32 = int32_t;
  using f32 = float;
#define FXA_READ(presence, kind, name) a.name = optional_view<kind>(options, #name, ElementType::kind);
  FXA_ATTENTION_SLOTS(FXA_READ)
#undef FXA_READ
  a.bias = optional_view<float>(options, "bias", ElementType::f32);
#define FXA_READ(name, otherwise) \
  if (options.contains(#name)) a.name = py::cast<double>(options[#name]);
  FXA_ATTENTION_NUMBERS(FXA_READ)
  FXA_READ(dropout_p, 0.0)
#undef FXA_READ
  const uint64_t seed = options.contains("seed") ? py::cast<uint64_t>(options["seed"]) : 0;
  a.dropout_seed.data = &seed;
  a.dropout_seed.present = true;
  a.dropout_seed.type = ElementType::i64;
  AttentionParams p = read_attention(a);
  content = check_attention_content(p);  // the kernels clamp ranges
  return p;
}

py::array result(DType dtype, std::vector<py::ssize_t> shape) {
  if (dtype == DType::f32) return py::array_t<float>(shape);
  return py::array_t<uint16_t>(shape);
}

py::tuple attention(const py::array& query, const py::array& key, const py::array& value, const std::string& isa,
                    int64_t workers, const py::kwargs& options) {
  AttentionContent content;
  AttentionParams p = params(query, key, value, options, content);
  py::array out = result(p.dtype, {p.rows_q, p.heads, p.value_dim});
  py::array_t<double> lse({p.heads, p.rows_q});
  p.out = out.mutable_data();
  p.lse_exact = lse.mutable_data();
  attention_forward(p, content, threads(workers), isa_of(isa));
  return py::make_tuple(out, lse);
}

py::tuple attention_grad(const py::array& grad_out, const py::array& out, const py::array& lse, const py::array& query,
                         const py::array& key, const py::array& value, const std::string& isa, int64_t workers,
                         const py::kwargs& options) {
  AttentionContent content;
  AttentionParams p = params(query, key, value, options, content);
  p.out = const_cast<void*>(out.data());
  p.lse_exact = static_cast<double*>(const_cast<void*>(lse.data()));
  AttentionGradients g;
  g.grad_out = grad_out.data();
  g.grad_out_row = elements_per(grad_out, 0), g.grad_out_head = elements_per(grad_out, 1);
  g.grad_lse = optional_view<float>(options, "grad_lse", ElementType::f32).as<float>();
  g.grad_lse_head = p.rows_q, g.grad_lse_row = 1;
  py::array dq = result(p.dtype, {p.rows_q, p.heads, p.head_dim});
  py::array dk = result(p.dtype, {p.rows_k, p.kv_heads, p.head_dim});
  py::array dv = result(p.dtype, {p.rows_k, p.kv_heads, p.value_dim});
  g.grad_query = dq.mutable_data(), g.grad_key = dk.mutable_data(), g.grad_value = dv.mutable_data();
  py::object dkb = py::none(), dbias = py::none();
  if (p.key_bias != nullptr) {
    const auto like = py::cast<py::array>(options["key_bias"]);
    g.key_bias_has_heads = like.ndim() == 2;
    py::array_t<float> a(std::vector<py::ssize_t>(like.shape(), like.shape() + like.ndim()));
    g.grad_key_bias = a.mutable_data();
    dkb = a;
  }
  if (p.bias != nullptr) {
    const int64_t* n = p.bias_size;
    py::array_t<float> a(std::vector<py::ssize_t>{n[0], n[1], n[2], n[3]});
    g.grad_bias = a.mutable_data();
    dbias = a;
  }
  attention_backward(p, g, content, threads(workers), isa_of(isa));
  return py::make_tuple(dq, dk, dv, dkb, dbias);
}

}  // namespace
}  // namespace fastxattn

PYBIND11_MODULE(_fastxattn_native, m) {
  m.def("isas", [] { return py::str(fastxattn::available_isas()).attr("split")(); });
  m.def("attention", &fastxattn::attention);
  m.def("attention_backward", &fastxattn::attention_grad);
}
