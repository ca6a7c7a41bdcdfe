// What an operator of the ONNX Runtime library is written with: a description, and a call with checked tensors.
#pragma once

#include <array>
#include <cstdint>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "bindings/ort_api.h"
#include "core/cpu/parallel.h"
#include "core/scalar.h"

namespace fastxattn::ort {

inline constexpr int kMaxRank = 6;

// A model's fault, reported as a status of the run. The message names the operator's input.
struct BadInput : std::invalid_argument {
  using std::invalid_argument::invalid_argument;
};

// One input as it lies in memory: contiguous, rank <= kMaxRank. `data` is null when the input is absent, which for an
// optional one includes being empty (a model-local function has to connect every input).
struct Tensor {
  const char* name = "";
  ElementType type = ElementType::undefined;
  int rank = 0;
  std::array<int64_t, kMaxRank> size{};
  const void* data = nullptr;

  explicit operator bool() const { return data != nullptr; }
  bool empty() const {
    for (int i = 0; i < rank; ++i) {
      if (size[i] == 0) return true;
    }
    return false;
  }
  template <class T>
  const T* as() const {
    return static_cast<const T*>(data);
  }

  // Throws BadInput unless the shape is `expected`; -1 stands for any size.
  void expect(std::initializer_list<int64_t> expected, const char* meaning) const;
};

enum class Kind : uint8_t { tensor, f32, i32, i64, boolean };  // `tensor`: the operator's floating-point type

struct Argument {
  const char* name;
  Kind kind;
  bool required = true;
};

struct Call;

// A tensor in a message is its shape.
std::ostream& operator<<(std::ostream& out, const Tensor& tensor);

// What the runtime is told about an operator, once per floating-point type.
struct Spec {
  const char* name;
  std::vector<Argument> inputs;
  std::vector<Argument> outputs;
  std::vector<std::pair<const char*, float>> floats;  // attributes and what they are when absent
  std::vector<std::pair<const char*, int64_t>> integers;
  void (*compute)(Call&);
  const char* provider = nullptr;  // null: the CPU's
};

// What is known of a node before it runs, so that a run need not ask.
struct Node {
  const Api* api;
  const Spec* spec;
  DType dtype;
  bool shape_references;           // the runtime has Api::shape_reference
  size_t inputs = 0, outputs = 0;  // how many the node has, absent ones in the middle included
  uint32_t absent = 0;             // bit i: input i is optional, and an empty constant of the graph
  std::array<float, 4> floats{};   // attributes in the order of the spec
  std::array<int64_t, 4> integers{};
};

// One run of one node.
struct Call {
  const Node& node;
  KernelContext* context;

  Tensor input(int index) const;
  // Allocates an output; null when nobody reads it.
  void* output(int index, std::initializer_list<int64_t> sizes) const;
  // The session's thread pool.
  Parallel parallel() const;
};

// Throws what a status says, releasing it.
void check(const Api* api, Status* status);

// The type and sizes of a value; throws when it is not a tensor of at most kMaxRank axes.
void describe(const Node& node, const Value* value, Tensor& tensor);

// Throws BadInput unless the condition holds. The message's parts are put together only then: printing numbers would
// take longer than everything else that is done for a small node.
template <class... Parts>
void require(bool condition, const Parts&... parts) {
  if (condition) [[likely]]
    return;
  std::ostringstream message;
  (message << ... << parts);
  throw BadInput(message.str());
}

// (batch + 1,) offsets that start at 0, never decrease and end within `rows`. The batch is returned.
int64_t check_offsets(const Tensor& offsets, int64_t rows);

// All operators, defined next to their kernels' bindings.
const Spec& attention_spec();
const Spec& importance_spec();
const Spec& absorbed_attention_spec();
const Spec& select_spec();
const Spec& attention_cuda_spec();  // in the CUDA twin of the library only

}  // namespace fastxattn::ort
