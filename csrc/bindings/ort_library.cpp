// The operator library for ONNX Runtime: `session_options.register_custom_ops_library(libfastxattn_ort.so)`.
#include <cstdlib>
#include <memory>
#include <mutex>

#include "bindings/ort_op.h"

namespace fastxattn::ort {
namespace {

// One operator for one floating-point type. The runtime keeps a pointer to it, so entries live for ever.
struct Entry : CustomOp {
  const Spec* spec;
  DType dtype;
  bool shape_references;
};

// A node: its attributes, read once.
struct Node {
  const Api* api;
  const Entry* entry;
  std::array<float, 4> floats{};
  std::array<int64_t, 4> integers{};
};

const Entry& entry_of(const CustomOp* op) { return *static_cast<const Entry*>(op); }

ElementType element_type(Kind kind, DType dtype) {
  switch (kind) {
    case Kind::f32: return ElementType::f32;
    case Kind::i32: return ElementType::i32;
    case Kind::i64: return ElementType::i64;
    case Kind::boolean: return ElementType::boolean;
    default: break;
  }
  return dtype == DType::f32 ? ElementType::f32 : dtype == DType::f16 ? ElementType::f16 : ElementType::bf16;
}

template <class T>
T attribute_or(const Api* api, const KernelInfo* info, const char* name, T fallback) {
  T value = fallback;
  Status* status = api->attribute(info, name, &value);
  if (status == nullptr) return value;
  api->release_status(status);
  return fallback;
}

Status* create(const CustomOp* op, const Api* api, const KernelInfo* info, void** kernel) {
  auto node = std::make_unique<Node>();
  node->api = api;
  node->entry = &entry_of(op);
  const Spec& spec = *node->entry->spec;
  for (size_t i = 0; i < spec.floats.size(); ++i)
    node->floats[i] = attribute_or(api, info, spec.floats[i].first, spec.floats[i].second);
  for (size_t i = 0; i < spec.integers.size(); ++i)
    node->integers[i] = attribute_or(api, info, spec.integers[i].first, spec.integers[i].second);
  *kernel = node.release();
  return nullptr;
}

// Nothing may be thrown through the runtime's frames: every failure becomes a status.
Status* compute(void* kernel, KernelContext* context) {
  const Node& node = *static_cast<const Node*>(kernel);
  const Spec& spec = *node.entry->spec;
  const auto who = [&spec] { return std::string("fastxattn::") + spec.name + ": "; };
  try {
    Call call{node.api,           node.entry->shape_references, context, &spec, node.entry->dtype,
              node.floats.data(), node.integers.data()};
    check(node.api, node.api->input_count(context, &call.inputs));
    check(node.api, node.api->output_count(context, &call.outputs));
    spec.compute(call);
    return nullptr;
  } catch (const BadInput& error) {
    return node.api->create_status(ErrorCode::invalid_argument, (who() + error.what()).c_str());
  } catch (const std::exception& error) {
    return node.api->create_status(ErrorCode::runtime_exception, (who() + error.what()).c_str());
  } catch (...) {
    return node.api->create_status(ErrorCode::fail, (who() + "unknown failure").c_str());
  }
}

Entry make_entry(const Spec& spec, DType dtype, bool shape_references) {
  Entry e{};
  e.version = kApiVersion;
  e.spec = &spec;
  e.dtype = dtype;
  e.shape_references = shape_references;
  e.name = [](const CustomOp* op) { return entry_of(op).spec->name; };
  e.execution_provider = [](const CustomOp*) -> const char* { return nullptr; };
  e.input_type = [](const CustomOp* op, size_t i) {
    return element_type(entry_of(op).spec->inputs[i].kind, entry_of(op).dtype);
  };
  e.input_count = [](const CustomOp* op) { return entry_of(op).spec->inputs.size(); };
  e.output_type = [](const CustomOp* op, size_t i) {
    return element_type(entry_of(op).spec->outputs[i].kind, entry_of(op).dtype);
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
    for (const Spec* spec : {&attention_spec(), &importance_spec(), &context_attention_spec(), &select_spec()}) {
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
  const Api* api = base->get_api(kApiVersion);
  if (api == nullptr) {
    const std::string message =
        std::string("fastxattn's operators need ONNX Runtime 1.17 or newer; this is ") + base->version_string();
    return base->get_api(1)->create_status(ErrorCode::not_implemented, message.c_str());
  }
  // Asking for a version that the runtime lacks makes it print an error, so the version string decides.
  const char* version = base->version_string();
  const int major = std::atoi(version);
  const char* dot = version;
  while (*dot != '\0' && *dot != '.') ++dot;
  const int minor = *dot == '.' ? std::atoi(dot + 1) : 0;
  const bool references = major > 1 || minor >= static_cast<int>(kShapeReferenceVersion);
  OpDomain* domain = nullptr;
  if (Status* status = api->create_custom_op_domain("fastxattn", &domain)) return status;
  for (const auto& entry : entries(references)) {
    if (Status* status = api->custom_op_domain_add(domain, static_cast<const CustomOp*>(&entry))) return status;
  }
  return api->add_custom_op_domain(options, domain);
}
