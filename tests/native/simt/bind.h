// How a kernel reaches Python under the runner: one bind_<op>.cpp per operation, found by name, with
//   FXA_SIMT_BIND(scale) { Memory memory; ...; a.number("n") ...; runner.run(...); return runner.statistics(); }
// which Python calls as simt.scale(x=array, y=array, n=3). Plain C underneath: pybind11 would take longer to compile
// than the kernels.
#pragma once

#include <cstring>
#include <map>
#include <string>

#include "core/cuda/device.h"

namespace fastxattn::simt {

// One keyword argument as Python passes it; build.py has the same layout.
struct Argument {
  const char* name;
  void* data;        // of an array, else null
  const char* text;  // of a string, else null
  double number;     // of a number
  int64_t bytes;     // of an array
  int64_t itemsize;
  int64_t dims;
  int64_t shape[4];
  int64_t strides[4];  // in elements
};

class Arguments {
 public:
  Arguments(const Argument* first, int count) : first_(first), count_(count) {}

  // Null when the keyword is absent or None.
  const Argument* find(const char* name) const {
    for (int i = 0; i < count_; ++i) {
      if (std::strcmp(first_[i].name, name) == 0) return first_ + i;
    }
    return nullptr;
  }
  const Argument& get(const char* name) const {
    const Argument* a = find(name);
    if (a == nullptr) throw SimtFault(std::string("missing argument ") + name);
    return *a;
  }
  double number(const char* name) const { return get(name).number; }
  double number(const char* name, double otherwise) const {
    const Argument* a = find(name);
    return a == nullptr ? otherwise : a->number;
  }
  int integer(const char* name) const { return static_cast<int>(number(name)); }
  int integer(const char* name, int otherwise) const { return static_cast<int>(number(name, otherwise)); }
  std::string text(const char* name) const { return get(name).text; }
  int size(const char* name, int axis = 0) const { return static_cast<int>(get(name).shape[axis]); }

  // Register an array as kernel input (read only) or output and give its address; null when it is absent.
  template <class V>
  const V* input(Memory& memory, const char* name) const {
    const Argument* a = checked<V>(name);
    if (a == nullptr) return nullptr;
    memory.read_only(a->data, static_cast<size_t>(a->bytes), name);
    return static_cast<const V*>(a->data);
  }
  template <class V>
  V* output(Memory& memory, const char* name, bool initialised = false) const {
    const Argument* a = checked<V>(name);
    if (a == nullptr) return nullptr;
    memory.writable(a->data, static_cast<size_t>(a->bytes), name, initialised);
    return static_cast<V*>(a->data);
  }

 private:
  template <class V>
  const Argument* checked(const char* name) const {
    const Argument* a = find(name);
    if constexpr (!std::is_void_v<V>) {
      if (a != nullptr && a->itemsize != static_cast<int64_t>(sizeof(V))) {
        throw SimtFault(std::string(name) + ": elements of " + std::to_string(a->itemsize) + " bytes, expected " +
                        std::to_string(sizeof(V)));
      }
    }
    return a;
  }

  const Argument* first_;
  int count_;
};

using BoundFunction = Statistics (*)(const Arguments&);
inline std::map<std::string, BoundFunction>& bindings() {
  static std::map<std::string, BoundFunction> table;
  return table;
}
struct Bind {
  Bind(const char* name, BoundFunction f) { bindings()[name] = f; }
};
#define FXA_SIMT_BIND(name)                                                             \
  static fastxattn::simt::Statistics bound_##name(const fastxattn::simt::Arguments& a); \
  static const fastxattn::simt::Bind register_##name(#name, &bound_##name);             \
  static fastxattn::simt::Statistics bound_##name([[maybe_unused]] const fastxattn::simt::Arguments& a)

}  // namespace fastxattn::simt
