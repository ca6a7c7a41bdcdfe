#include "bindings/ort_op.h"

#include <thread>

namespace fastxattn::ort {

void check(const Api* api, Status* status) {
  if (status == nullptr) return;
  api->release_status(status);
  throw std::runtime_error("a call into ONNX Runtime failed");
}

void describe(const Node& node, const Value* value, View& view) {
  const Api* api = node.api;
  size_t rank = 0;
  RuntimeType type;  // the runtime has compared it with the operator's description
  if (node.shape_references) {
    const int64_t* sizes = nullptr;  // the call refuses what is not a tensor
    check(api, api->shape_reference(value, &type, &sizes, &rank));
    if (rank <= View::kMaxRank) {
      for (size_t i = 0; i < rank; ++i) view.size[i] = sizes[i];
    }
  } else {
    int dense = 0;
    check(api, api->is_tensor(value, &dense));
    require(dense, view.name, " must be a tensor");
    ShapeInfo* info = nullptr;
    check(api, api->tensor_shape(value, &info));
    Status* status = api->shape_element_type(info, &type);
    if (status == nullptr) status = api->shape_rank(info, &rank);
    if (status == nullptr && rank <= View::kMaxRank) status = api->shape_sizes(info, view.size, rank);
    api->release_shape(info);
    check(api, status);
  }
  require(rank <= View::kMaxRank, view.name, " has too many axes: ", rank);
  view.rank = static_cast<int>(rank);
  view.set_contiguous();
}

namespace {

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

}  // namespace

View Call::input(int index) const {
  View view;
  const Argument& argument = node.spec->inputs[index];
  view.name = argument.name;
  if (node.absent >> index & 1) return view;
  const Value* value = nullptr;
  if (static_cast<size_t>(index) < node.inputs) check(node.api, node.api->input(context, index, &value));
  if (value == nullptr) {
    require(!argument.required, argument.name, " is missing");
    return view;
  }
  describe(node, value, view);
  if (!argument.required && view.empty()) return view;
  view.type = element_type(argument.kind, node.dtype);
  view.present = true;
  void* data = nullptr;
  check(node.api, node.api->tensor_data(const_cast<Value*>(value), &data));
  // A required tensor that is empty may have no memory.
  static const int64_t kNothing[8] = {};
  view.data = data != nullptr ? data : kNothing;
  return view;
}

void* Call::output(int index, std::initializer_list<int64_t> sizes) const {
  const Argument& argument = node.spec->outputs[index];
  Value* value = nullptr;
  if (static_cast<size_t>(index) < node.outputs) {
    check(node.api, node.api->output(context, index, sizes.begin(), sizes.size(), &value));
  }
  if (value == nullptr) {
    require(!argument.required, "the output ", argument.name, " must be connected");
    return nullptr;
  }
  void* data = nullptr;
  check(node.api, node.api->tensor_data(value, &data));
  return data;
}

int64_t check_offsets(const View& offsets, int64_t rows) {
  offsets.expect({-1}, "(batch + 1,)");
  const int64_t batch = offsets.size[0] - 1;
  require(batch >= 0, offsets.name, " must have at least 1 entry");
  const int32_t* at = offsets.as<int32_t>();
  bool sound = at[0] == 0 && at[batch] <= rows;
  for (int64_t b = 0; b < batch; ++b) sound = sound && at[b] <= at[b + 1];
  require(sound, offsets.name, " must start at 0, never decrease and end within the ", rows, " rows");
  return batch;
}

namespace {

struct Work {
  Parallel::Body body;
  void* context;
};

}  // namespace

Parallel Call::parallel() const {
  // The pool's size is not in the C API. It splits a range over the threads it has, and tasks are handed out one at a
  // time, so a surplus of workers only finds nothing left to do.
  static const int64_t workers = std::thread::hardware_concurrency() > 0 ? std::thread::hardware_concurrency() : 1;
  Parallel parallel;
  parallel.pool = const_cast<Call*>(this);
  parallel.workers = workers;
  parallel.run = [](void* pool, int64_t count, Parallel::Body body, void* context) {
    const Call& call = *static_cast<const Call*>(pool);
    Work work{body, context};
    const Api* api = call.node.api;
    check(api, api->parallel_for(
                   call.context,
                   [](void* data, size_t worker) {
                     const Work& w = *static_cast<const Work*>(data);
                     w.body(static_cast<int64_t>(worker), w.context);
                   },
                   static_cast<size_t>(count), 0, &work));
  };
  return parallel;
}

}  // namespace fastxattn::ort
