#include "bindings/ort_op.h"

#include <thread>

namespace fastxattn::ort {

void check(const Api* api, Status* status) {
  if (status == nullptr) return;
  api->release_status(status);
  throw std::runtime_error("a call into ONNX Runtime failed");
}

std::string Tensor::shape() const {
  std::string text = "(";
  for (int i = 0; i < rank; ++i) text += (i ? ", " : "") + std::to_string(size[i]);
  return text + ")";
}

void Tensor::expect(std::initializer_list<int64_t> expected, const char* meaning) const {
  bool same = static_cast<size_t>(rank) == expected.size();
  int i = 0;
  for (const int64_t want : expected) {
    if (!same) break;
    same = want < 0 || size[i] == want;
    ++i;
  }
  if (!same) throw BadInput(std::string(name) + " must have shape " + meaning + "; got " + shape());
}

Tensor Call::input(int index) const {
  Tensor tensor;
  const Argument& argument = spec->inputs[index];
  tensor.name = argument.name;
  const Value* value = nullptr;
  if (static_cast<size_t>(index) < inputs) check(api, api->input(context, index, &value));
  if (value == nullptr) {
    if (argument.required) throw BadInput(std::string(argument.name) + " is missing");
    return tensor;
  }
  size_t rank = 0;
  if (shape_references) {
    const int64_t* sizes = nullptr;  // the call refuses what is not a tensor
    check(api, api->shape_reference(value, &tensor.type, &sizes, &rank));
    if (rank <= kMaxRank) {
      for (size_t i = 0; i < rank; ++i) tensor.size[i] = sizes[i];
    }
  } else {
    int dense = 0;
    check(api, api->is_tensor(value, &dense));
    if (!dense) throw BadInput(std::string(argument.name) + " must be a tensor");
    ShapeInfo* info = nullptr;
    check(api, api->tensor_shape(value, &info));
    Status* status = api->shape_element_type(info, &tensor.type);
    if (status == nullptr) status = api->shape_rank(info, &rank);
    if (status == nullptr && rank <= kMaxRank) status = api->shape_sizes(info, tensor.size.data(), rank);
    api->release_shape(info);
    check(api, status);
  }
  if (rank > kMaxRank) throw BadInput(std::string(argument.name) + " has too many axes: " + std::to_string(rank));
  tensor.rank = static_cast<int>(rank);
  if (!argument.required && tensor.elements() == 0) return tensor;  // as if it were not there
  void* data = nullptr;
  check(api, api->tensor_data(const_cast<Value*>(value), &data));
  // A required tensor that is empty may have no memory; it is present all the same.
  static const int64_t kNothing[8] = {};
  tensor.data = data != nullptr ? data : kNothing;
  return tensor;
}

void* Call::output(int index, std::initializer_list<int64_t> sizes) const {
  const Argument& argument = spec->outputs[index];
  Value* value = nullptr;
  if (static_cast<size_t>(index) < outputs) {
    check(api, api->output(context, index, sizes.begin(), sizes.size(), &value));
  }
  if (value == nullptr) {
    require(!argument.required, std::string("the output ") + argument.name + " must be connected");
    return nullptr;
  }
  void* data = nullptr;
  check(api, api->tensor_data(value, &data));
  return data;
}

int64_t check_offsets(const Tensor& offsets, int64_t rows) {
  offsets.expect({-1}, "(batch + 1,)");
  const int64_t batch = offsets.size[0] - 1;
  require(batch >= 0, std::string(offsets.name) + " must have at least 1 entry");
  const int32_t* at = offsets.as<int32_t>();
  bool sound = at[0] == 0 && at[batch] <= rows;
  for (int64_t b = 0; b < batch; ++b) sound = sound && at[b] <= at[b + 1];
  require(sound, std::string(offsets.name) + " must start at 0, never decrease and end within the " +
                     std::to_string(rows) + " rows");
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
    check(call.api, call.api->parallel_for(
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
