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
  size_t count = 0;
  check(api, api->input_count(context, &count));
  if (static_cast<size_t>(index) < count) check(api, api->input(context, index, &value));
  if (value == nullptr) {
    if (argument.required) throw BadInput(std::string(argument.name) + " is missing");
    return tensor;
  }
  int dense = 0;
  check(api, api->is_tensor(value, &dense));
  if (!dense) throw BadInput(std::string(argument.name) + " must be a tensor");
  size_t rank = 0;
  if (shape_references) {
    const int64_t* sizes = nullptr;
    check(api, api->shape_reference(value, &tensor.type, &sizes, &rank));
    if (rank <= kMaxRank) {
      for (size_t i = 0; i < rank; ++i) tensor.size[i] = sizes[i];
    }
  } else {
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
  size_t count = 0;
  check(api, api->output_count(context, &count));
  if (static_cast<size_t>(index) >= count) return nullptr;
  Value* value = nullptr;
  check(api, api->output(context, index, sizes.begin(), sizes.size(), &value));
  if (value == nullptr) return nullptr;
  void* data = nullptr;
  check(api, api->tensor_data(value, &data));
  return data;
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
