// An operator's tensor arguments as any framework passes them, and the error that refuses them.
#pragma once

#include <cmath>
#include <cstdint>
#include <ostream>
#include <sstream>
#include <stdexcept>

#include "core/scalar.h"

namespace fastxattn {

// An argument that breaks a rule. The message names the argument, the rule and the value, in the words of the Python
// checks; each binding turns it into its framework's error.
struct BadArgument : std::invalid_argument {
  using std::invalid_argument::invalid_argument;
};

// Throws BadArgument unless the condition holds. The message's parts are put together only then: printing numbers would
// take longer than all other work of a small call.
template <class... Parts>
void require(bool condition, const Parts&... parts) {
  if (condition) [[likely]]
    return;
  std::ostringstream message;
  (message << ... << parts);
  throw BadArgument(message.str());
}

enum class ElementType : uint8_t { f32, bf16, f16, f64, i32, i64, boolean, other };

inline std::ostream& operator<<(std::ostream& out, ElementType type) {
  constexpr const char* kNames[] = {"float32", "bfloat16", "float16", "float64", "int32", "int64", "bool", "another"};
  return out << kNames[static_cast<int>(type)];
}

// A tensor in memory, or its absence.
struct View {
  static constexpr int kMaxRank = 6;

  const char* name = "";
  const void* data = nullptr;  // may be null when there are no elements
  bool present = false;
  ElementType type = ElementType::other;
  int rank = 0;
  int64_t size[kMaxRank] = {};
  int64_t stride[kMaxRank] = {};  // in elements

  explicit operator bool() const { return present; }
  bool empty() const {
    for (int i = 0; i < rank; ++i) {
      if (size[i] == 0) return true;
    }
    return false;
  }
  bool contiguous() const {
    int64_t expected = 1;
    for (int i = rank - 1; i >= 0; --i) {
      if (size[i] != 1 && stride[i] != expected) return empty();
      expected *= size[i];
    }
    return true;
  }
  void set_contiguous() {
    int64_t next = 1;
    for (int i = rank - 1; i >= 0; --i) {
      stride[i] = next;
      next *= size[i];
    }
  }
  template <class T>
  const T* as() const {
    return static_cast<const T*>(data);
  }
  // Throws BadArgument unless the shape is `expected`; -1 stands for any size.
  void expect(std::initializer_list<int64_t> expected, const char* meaning) const {
    bool same = static_cast<size_t>(rank) == expected.size();
    int i = 0;
    for (const int64_t n : expected) {
      same = same && (n < 0 || size[i] == n);
      ++i;
    }
    require(same, name, " must have shape ", meaning, "; got ", *this);
  }
  // In a message a view is its shape.
  friend std::ostream& operator<<(std::ostream& out, const View& view) {
    out << "(";
    for (int i = 0; i < view.rank; ++i) out << (i ? ", " : "") << view.size[i];
    return out << ")";
  }
};

// A number as kernels take it, in float32: finite there, and at least `least`, which is 0 or -infinity.
inline float read_number(const char* name, double number, double least = -INFINITY) {
  const float narrow = static_cast<float>(number);
  require(std::isfinite(narrow) && number >= least, name, " must be finite", least < 0 ? "" : " and at least 0",
          "; got ", number);
  return narrow;
}

// The dtype of rows that kernels compute with.
inline DType dtype_of(const View& view) {
  require(view.type <= ElementType::f16, view.name, " must be float32, bfloat16 or float16; got ", view.type);
  return view.type == ElementType::f32 ? DType::f32 : view.type == ElementType::f16 ? DType::f16 : DType::bf16;
}

}  // namespace fastxattn
