// Element types as they lie in memory, and exact conversions of single elements.
#pragma once

#include <bit>
#include <cstdint>
#include <cstring>

namespace fastxattn {

enum class DType : int32_t { f32 = 0, bf16 = 1, f16 = 2 };

inline constexpr int64_t dtype_size(DType dtype) { return dtype == DType::f32 ? 4 : 2; }

// Zeros `bytes` bytes at `first`. Null, which memset does not accept, is a result that is not requested, or an empty
// tensor.
inline void zero_bytes(void* to, int64_t bytes, int64_t first = 0) {
  if (to != nullptr) std::memset(static_cast<char*>(to) + first, 0, static_cast<size_t>(bytes));
}

struct bf16_t {
  uint16_t bits;
};
struct f16_t {
  uint16_t bits;
};

inline float to_f32(float x) { return x; }
inline float to_f32(bf16_t x) { return std::bit_cast<float>(static_cast<uint32_t>(x.bits) << 16); }
inline float to_f32(f16_t x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
  const uint32_t magnitude = x.bits & 0x7fffu;
  if (magnitude >= 0x7c00u) return std::bit_cast<float>(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
  // Shifting the exponent field up by 13 and multiplying by 2^112 rebias normals and subnormals alike.
  const float scaled = std::bit_cast<float>(magnitude << 13) * std::bit_cast<float>(0x77800000u);
  return std::bit_cast<float>(sign | std::bit_cast<uint32_t>(scaled));
}

// Round to nearest, ties to even; NaN stays NaN.
template <class T>
T from_f32(float x);
template <>
inline float from_f32<float>(float x) {
  return x;
}
template <>
inline bf16_t from_f32<bf16_t>(float x) {
  const uint32_t u = std::bit_cast<uint32_t>(x);
  if ((u & 0x7fffffffu) > 0x7f800000u) return {static_cast<uint16_t>(u >> 16 | 0x40u)};
  return {static_cast<uint16_t>((u + 0x7fffu + (u >> 16 & 1u)) >> 16)};
}
template <>
inline f16_t from_f32<f16_t>(float x) {
  const uint32_t u = std::bit_cast<uint32_t>(x);
  const uint16_t sign = static_cast<uint16_t>(u >> 16 & 0x8000u);
  const uint32_t magnitude = u & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return {static_cast<uint16_t>(sign | 0x7e00u)};
  if (magnitude >= 0x477ff000u) return {static_cast<uint16_t>(sign | 0x7c00u)};  // >= 65520 rounds to inf
  if (magnitude < 0x38800000u) {
    // Subnormal: adding 0.5 makes the float adder round at the right bit.
    const float rounded = std::bit_cast<float>(magnitude) + 0.5f;
    return {static_cast<uint16_t>(sign | (std::bit_cast<uint32_t>(rounded) - 0x3f000000u))};
  }
  const uint32_t rounded = magnitude + 0xfffu + (magnitude >> 13 & 1u);
  return {static_cast<uint16_t>(sign | (rounded - 0x38000000u) >> 13)};
}

}  // namespace fastxattn
