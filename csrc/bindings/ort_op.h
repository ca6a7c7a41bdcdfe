// What an operator of the ONNX Runtime library is written with: a description, and a call with checked tensors.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <vector>

#include "bindings/ort_api.h"
#include "core/arguments.h"
#include "core/cpu/parallel.h"
#include "core/scalar.h"

namespace fastxattn::ort {

enum class Kind : uint8_t { tensor, f32, i32, i64, boolean };  // `tensor`: the operator's floating-point type

struct Argument {
  const char* name;
  Kind kind;
  bool required = true;
};

struct Call;

// An operator's description, registered once per floating-point type.
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

  // An input, contiguous. An optional one is absent also when it is empty: a model-local function has to connect all.
  View input(int index) const;
  // Allocates an output; null when nobody reads it.
  void* output(int index, std::initializer_list<int64_t> sizes) const;
  // The session's thread pool.
  Parallel parallel() const;
};

// Throws what a status says, releasing it.
void check(const Api* api, Status* status);

// Fills in the sizes of a value; throws when it is not a tensor of at most View::kMaxRank axes.
void describe(const Node& node, const Value* value, View& view);

// (batch + 1,) offsets that start at 0, never decrease and end within `rows`. The batch is returned.
int64_t check_offsets(const View& offsets, int64_t rows);

// All operators, defined next to their kernels' bindings.
const Spec& attention_spec();
const Spec& importance_spec();
const Spec& absorbed_attention_spec();
const Spec& select_spec();
const Spec& attention_cuda_spec();  // in the CUDA twin of the library only

}  // namespace fastxattn::ort
