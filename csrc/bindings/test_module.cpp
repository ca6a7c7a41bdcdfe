// _fastxattn_native: the torch-free cores for tests. NumPy arrays in, a forced instruction set, NumPy arrays out;
// bfloat16 and float16 travel as uint16. Runs under AddressSanitizer, where libtorch would be in the way.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cstring>
#include <string>
#include <thread>
#include <vector>

#include "attention/attention.h"
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

DType dtype_of(const std::string& name) {
  if (name == "float32") return DType::f32;
  if (name == "bfloat16") return DType::bf16;
  if (name == "float16") return DType::f16;
  throw py::value_error("unknown dtype: " + name);
}

// An optional keyword's array of T; the caller's array is used as it is, so it must have the right type.
template <class T>
const T* optional(const py::dict& options, const char* name) {
  if (!options.contains(name)) return nullptr;
  return static_cast<const T*>(py::array_t<T, py::array::c_style>::ensure(options[name]).data());
}

int64_t elements_per(const py::array& a, int axis) { return a.strides(axis) / a.itemsize(); }

AttentionParams params(const py::array& query, const py::array& key, const py::array& value, const py::dict& options,
                       AttentionContent& content) {
  AttentionParams p;
  p.dtype = dtype_of(py::cast<std::string>(options["dtype"]));
  p.query = query.data(), p.key = key.data(), p.value = value.data();
  p.query_row = elements_per(query, 0), p.query_head = elements_per(query, 1);
  p.key_row = elements_per(key, 0), p.key_head = elements_per(key, 1);
  p.value_row = elements_per(value, 0), p.value_head = elements_per(value, 1);
  p.rows_q = query.shape(0), p.heads = query.shape(1), p.head_dim = query.shape(2);
  p.rows_k = key.shape(0), p.kv_heads = key.shape(1), p.value_dim = value.shape(2);
  p.cu_q = optional<int32_t>(options, "cu_seqlens_q");
  p.cu_k = optional<int32_t>(options, "cu_seqlens_k");
  p.batch = py::cast<py::array>(options["cu_seqlens_q"]).shape(0) - 1;
  p.used_q = optional<int32_t>(options, "seqused_q");
  p.used_k = optional<int32_t>(options, "seqused_k");
  p.index_q = optional<int32_t>(options, "query_index");
  p.index_k = optional<int32_t>(options, "key_index");
  p.slots_q = p.index_q ? py::cast<py::array>(options["query_index"]).shape(0) : p.rows_q;
  p.slots_k = p.index_k ? py::cast<py::array>(options["key_index"]).shape(0) : p.rows_k;
  p.kv_range = optional<int32_t>(options, "kv_range");
  p.key_bias = optional<float>(options, "key_bias");
  if (p.key_bias != nullptr) {
    const auto a = py::cast<py::array>(options["key_bias"]);
    p.key_bias_row = elements_per(a, 0);
    p.key_bias_head = a.ndim() == 2 ? elements_per(a, 1) : 0;
  }
  p.bias = optional<float>(options, "bias");
  if (p.bias != nullptr) {
    const auto a = py::cast<py::array>(options["bias"]);
    for (int i = 0; i < 4; ++i) {
      p.bias_size[i] = a.shape(i);
      p.bias_stride[i] = a.shape(i) == 1 ? 0 : elements_per(a, i);
    }
  }
  auto number = [&](const char* name, float otherwise) {
    return options.contains(name) ? py::cast<float>(options[name]) : otherwise;
  };
  p.scale = number("scale", 1.0f);
  p.softcap = number("softcap", 0.0f);
  p.dropout_p = number("dropout_p", 0.0f);
  if (options.contains("seed")) p.seed = py::cast<uint64_t>(options["seed"]);
  const std::string fault = check_attention_content(p, content);
  if (!fault.empty()) throw py::value_error(fault);
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
  g.grad_lse = optional<float>(options, "grad_lse");
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
