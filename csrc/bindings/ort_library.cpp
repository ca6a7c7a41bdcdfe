// The operator library for ONNX Runtime: `session_options.register_custom_ops_library(libfastxattn_ort.so)`.
#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>

#include "bindings/ort_op.h"

namespace fastxattn::ort {
namespace {

// One operator for one floating-point type. The runtime keeps a pointer to it, so entries live for ever.
struct Entry : CustomOp {
  const Spec* spec;
  DType dtype;
  bool shape_references;
};

const Entry& entry_of(const CustomOp* op) { return *static_cast<const Entry*>(op); }

RuntimeType runtime_type(Kind kind, DType dtype) {
  switch (kind) {
    case Kind::f32: return RuntimeType::f32;
    case Kind::i32: return RuntimeType::i32;
    case Kind::i64: return RuntimeType::i64;
    case Kind::boolean: return RuntimeType::boolean;
    default: break;
  }
  return dtype == DType::f32 ? RuntimeType::f32 : dtype == DType::f16 ? RuntimeType::f16 : RuntimeType::bf16;
}

template <class T>
T attribute_or(const Api* api, const KernelInfo* info, const char* name, T fallback) {
  T value = fallback;
  Status* status = api->attribute(info, name, &value);
  if (status == nullptr) return value;
  api->release_status(status);
  return fallback;
}

// Whether an optional input is an empty constant, which is how a file says that it is absent.
bool is_absent(const Node& node, const KernelInfo* info, size_t index) {
  int constant = 0;
  const Value* value = nullptr;
  Status* status = node.api->constant_input(info, index, &constant, &value);
  if (status != nullptr) node.api->release_status(status);
  if (status != nullptr || !constant || value == nullptr) return false;
  View view;
  view.name = node.spec->inputs[index].name;
  describe(node, value, view);
  return view.empty();
}

// Nothing may be thrown through the runtime's frames: every failure becomes a status.
template <class F>
Status* guarded(const Api* api, const Spec& spec, F&& body) {
  const auto status = [&](ErrorCode code, const char* what) {
    return api->create_status(code, (std::string("fastxattn::") + spec.name + ": " + what).c_str());
  };
  try {
    body();
    return nullptr;
  } catch (const BadArgument& error) {
    return status(ErrorCode::invalid_argument, error.what());
  } catch (const std::bad_alloc&) {
    return status(ErrorCode::runtime_exception, "out of memory for temporary results");
  } catch (const std::exception& error) {
    return status(ErrorCode::runtime_exception, error.what());
  } catch (...) {
    return status(ErrorCode::fail, "unknown failure");
  }
}

Status* create(const CustomOp* op, const Api* api, const KernelInfo* info, void** kernel) {
  const Entry& entry = entry_of(op);
  const Spec& spec = *entry.spec;
  return guarded(api, spec, [&] {
    auto node = std::make_unique<Node>(Node{api, &spec, entry.dtype, entry.shape_references});
    check(api, api->input_count(info, &node->inputs));
    check(api, api->output_count(info, &node->outputs));
    for (size_t i = 0; i < spec.floats.size(); ++i)
      node->floats[i] = attribute_or(api, info, spec.floats[i].first, spec.floats[i].second);
    for (size_t i = 0; i < spec.integers.size(); ++i)
      node->integers[i] = attribute_or(api, info, spec.integers[i].first, spec.integers[i].second);
    for (size_t i = 0; i < std::min(node->inputs, spec.inputs.size()); ++i) {
      if (!spec.inputs[i].required && is_absent(*node, info, i)) node->absent |= uint32_t{1} << i;
    }
    *kernel = node.release();
  });
}

Status* compute(void* kernel, KernelContext* context) {
  const Node& node = *static_cast<const Node*>(kernel);
  return guarded(node.api, *node.spec, [&] {
    Call call{node, context};
    node.spec->compute(call);
  });
}

Entry make_entry(const Spec& spec, DType dtype, bool shape_references) {
  Entry e{};
  e.version = kApiVersion;
  e.spec = &spec;
  e.dtype = dtype;
  e.shape_references = shape_references;
  e.name = [](const CustomOp* op) { return entry_of(op).spec->name; };
  e.execution_provider = [](const CustomOp* op) { return entry_of(op).spec->provider; };
  e.input_type = [](const CustomOp* op, size_t i) {
    return runtime_type(entry_of(op).spec->inputs[i].kind, entry_of(op).dtype);
  };
  e.input_count = [](const CustomOp* op) { return entry_of(op).spec->inputs.size(); };
  e.output_type = [](const CustomOp* op, size_t i) {
    return runtime_type(entry_of(op).spec->outputs[i].kind, entry_of(op).dtype);
  };
  e.output_count = [](const CustomOp* op) { return entry_of(op).spec->outputs.size(); };
  e.destroy = [](void* kernel) { delete static_cast<Node*>(kernel); };
  e.input_presence = [](const CustomOp* op, size_t i) {
    return entry_of(op).spec->inputs[i].required ? Presence::required : Presence::optional;
  };
  e.output_presence = [](const CustomOp* op, size_t i) {
    return entry_of(op).spec->outputs[i].required ? Presence::required : Presence::optional;
  };
  e.input_memory = [](const CustomOp*, size_t) { return 0; };
  e.create_kernel_checked = create;
  e.compute_checked = compute;
  e.start_version = [](const CustomOp*) { return 1; };
  e.end_version = [](const CustomOp*) { return INT32_MAX; };
  return e;
}

// Built on first registration and kept: sessions refer to them until the process ends.
const std::vector<Entry>& entries(bool shape_references) {
  static const std::vector<Entry> all = [shape_references] {
    std::vector<Entry> list;
    std::vector<const Spec*> specs{&attention_spec(), &importance_spec(), &absorbed_attention_spec(), &select_spec()};
#ifdef FXA_ORT_CUDA
    specs.push_back(&attention_cuda_spec());
#endif
    for (const Spec* spec : specs) {
      bool typed = false;
      for (const Argument& input : spec->inputs) typed = typed || input.kind == Kind::tensor;
      for (const DType dtype : {DType::f32, DType::f16, DType::bf16}) {
        list.push_back(make_entry(*spec, dtype, shape_references));
        if (!typed) break;
      }
    }
    return list;
  }();
  return all;
}

}  // namespace
}  // namespace fastxattn::ort

// The entry point that ONNX Runtime looks for.
extern "C" __attribute__((visibility("default"))) fastxattn::ort::Status* RegisterCustomOps(
    fastxattn::ort::SessionOptions* options, const fastxattn::ort::ApiBase* base) {
  using namespace fastxattn::ort;
  // Asking for a version that the runtime lacks makes it print an error, so the version string decides.
  const char* version = base->version_string();
  const int major = std::atoi(version);
  const char* dot = std::strchr(version, '.');
  const int minor = dot != nullptr ? std::atoi(dot + 1) : 0;
  const auto has = [&](uint32_t needed) { return major > 1 || minor >= static_cast<int>(needed); };
  if (!has(kApiVersion)) {
    const std::string message =
        std::string("fastxattn's operators need ONNX Runtime 1.17 or newer; this is ") + version;
    return base->get_api(1)->create_status(ErrorCode::not_implemented, message.c_str());
  }
  const Api* api = base->get_api(kApiVersion);
  const bool references = has(kShapeReferenceVersion);
  OpDomain* domain = nullptr;
  if (Status* status = api->create_custom_op_domain("fastxattn", &domain)) return status;
  for (const auto& entry : entries(references)) {
    if (Status* status = api->custom_op_domain_add(domain, static_cast<const CustomOp*>(&entry))) return status;
  }
  return api->add_custom_op_domain(options, domain);
}
