// Runs attention, forward and backward, and key importance on NEON and on the generic instruction set, and compares.
// No torch: built by a cross compiler and run under an emulator (test_neon.py), or natively on an ARM machine.
#include <cmath>
#include <cstdio>
#include <random>
#include <vector>

#include "attention/attention.h"
#include "attention/attention_check.h"
#include "importance/importance.h"

using namespace fastxattn;

namespace {

struct Case {
  const char* name;
  std::vector<int32_t> queries, keys;  // lengths of the sequences
  int64_t kv_heads, group, head_dim, value_dim;
  bool range, key_bias, bias;
  float softcap, dropout_p;
};

using Bytes = std::vector<char>;

// n normal numbers as the dtype lies in memory.
Bytes numbers(std::mt19937& random, int64_t n, DType dtype) {
  std::normal_distribution<float> normal;
  Bytes bytes(static_cast<size_t>(n * dtype_size(dtype)));
  for (int64_t i = 0; i < n; ++i) {
    const float x = normal(random);
    if (dtype == DType::f32) reinterpret_cast<float*>(bytes.data())[i] = x;
    if (dtype == DType::bf16) reinterpret_cast<bf16_t*>(bytes.data())[i] = from_f32<bf16_t>(x);
    if (dtype == DType::f16) reinterpret_cast<f16_t*>(bytes.data())[i] = from_f32<f16_t>(x);
  }
  return bytes;
}

float number(const Bytes& bytes, int64_t i, DType dtype) {
  if (dtype == DType::bf16) return to_f32(reinterpret_cast<const bf16_t*>(bytes.data())[i]);
  if (dtype == DType::f16) return to_f32(reinterpret_cast<const f16_t*>(bytes.data())[i]);
  return reinterpret_cast<const float*>(bytes.data())[i];
}

std::vector<int32_t> offsets(const std::vector<int32_t>& lengths) {
  std::vector<int32_t> cu{0};
  for (int32_t n : lengths) cu.push_back(cu.back() + n);
  return cu;
}

struct Result {
  const char* name;
  DType dtype;
  Bytes bytes;
};

std::vector<Result> run(const Case& c, DType dtype, Isa isa) {
  std::mt19937 random(7);
  const auto cu_q = offsets(c.queries), cu_k = offsets(c.keys);
  AttentionParams p;
  p.dtype = dtype;
  p.batch = static_cast<int64_t>(c.queries.size());
  p.cu_q = cu_q.data(), p.cu_k = cu_k.data();
  p.rows_q = p.slots_q = cu_q.back(), p.rows_k = p.slots_k = cu_k.back();
  p.kv_heads = c.kv_heads, p.heads = c.kv_heads * c.group;
  p.head_dim = c.head_dim, p.value_dim = c.value_dim;
  p.query_head = p.key_head = c.head_dim, p.value_head = c.value_dim;
  p.query_row = p.heads * c.head_dim, p.key_row = p.kv_heads * c.head_dim, p.value_row = p.kv_heads * c.value_dim;
  p.scale = 1.0f / std::sqrt(static_cast<float>(c.head_dim));
  p.softcap = c.softcap, p.dropout_p = c.dropout_p, p.seed = 12345;
  const Bytes query = numbers(random, p.rows_q * p.heads * c.head_dim, dtype);
  const Bytes key = numbers(random, p.rows_k * p.kv_heads * c.head_dim, dtype);
  const Bytes value = numbers(random, p.rows_k * p.kv_heads * c.value_dim, dtype);
  const Bytes grad_out = numbers(random, p.rows_q * p.heads * c.value_dim, dtype);
  const Bytes grad_lse = numbers(random, p.heads * p.rows_q, DType::f32);
  const Bytes key_bias = numbers(random, p.rows_k, DType::f32);
  const int64_t places_q = 700, places_k = 700;
  const Bytes bias = numbers(random, places_q * places_k, DType::f32);
  p.query = query.data(), p.key = key.data(), p.value = value.data();
  std::vector<int32_t> range;
  for (size_t b = 0; b < c.queries.size(); ++b) {
    for (int32_t i = 0; i < c.queries[b]; ++i) {
      range.push_back(i * 7 % (c.keys[b] + 1) / 2);
      range.push_back(c.keys[b] - i * 5 % (c.keys[b] + 1) / 2);
    }
  }
  if (c.range) p.kv_range = range.data();
  if (c.key_bias) p.key_bias = reinterpret_cast<const float*>(key_bias.data()), p.key_bias_row = 1;
  if (c.bias) {
    p.bias = bias.data();
    p.bias_size[2] = places_q, p.bias_size[3] = places_k;
    p.bias_stride[2] = places_k, p.bias_stride[3] = 1;
  }
  std::vector<Result> results;
  const auto result = [&](const char* name, int64_t n, DType type) {
    results.push_back({name, type, Bytes(static_cast<size_t>(n * dtype_size(type)), 0)});
    return static_cast<void*>(results.back().bytes.data());
  };
  results.reserve(16);
  std::vector<double> exact(static_cast<size_t>(p.heads * p.rows_q));
  p.out = result("out", p.rows_q * p.heads * c.value_dim, dtype);
  p.lse = static_cast<float*>(result("lse", p.heads * p.rows_q, DType::f32));
  p.lse_exact = exact.data();
  const AttentionContent content = check_attention_content(p);
  check_attention_ranges(p);
  attention_forward(p, content, Parallel{}, isa);

  AttentionGradients g;
  g.grad_out = grad_out.data(), g.grad_out_row = p.heads * c.value_dim, g.grad_out_head = c.value_dim;
  g.grad_lse = reinterpret_cast<const float*>(grad_lse.data()), g.grad_lse_head = p.rows_q, g.grad_lse_row = 1;
  g.grad_query = result("grad_query", p.rows_q * p.heads * c.head_dim, dtype);
  g.grad_key = result("grad_key", p.rows_k * p.kv_heads * c.head_dim, dtype);
  g.grad_value = result("grad_value", p.rows_k * p.kv_heads * c.value_dim, dtype);
  if (c.key_bias) g.grad_key_bias = static_cast<float*>(result("grad_key_bias", p.rows_k, DType::f32));
  if (c.bias) g.grad_bias = result("grad_bias", places_q * places_k, DType::f32);
  attention_backward(p, g, content, Parallel{}, isa);

  if (!c.bias && c.dropout_p == 0.0f) {
    ImportanceParams importance;
    importance.attention = p;
    importance.lse = p.lse;
    importance.attention.lse = nullptr;
    importance.score = static_cast<float*>(result("importance", p.heads * p.slots_k, DType::f32));
    key_importance(importance, Parallel{}, isa);
  }
  return results;
}

// Whether two results agree; a 16-bit weight or result may round the other way, once per product.
bool agree(const Case& c, const Result& neon, const Result& generic, DType dtype) {
  const float tolerance = dtype == DType::f32 ? 3e-5f : dtype == DType::f16 ? 5e-3f : 4e-2f;
  float most = 0.0f, worst = 0.0f;
  const int64_t n = static_cast<int64_t>(neon.bytes.size()) / dtype_size(neon.dtype);
  for (int64_t i = 0; i < n; ++i) {
    const float a = number(neon.bytes, i, neon.dtype), b = number(generic.bytes, i, neon.dtype);
    if (!std::isfinite(a) || !std::isfinite(b)) {
      if (a == b) continue;
      std::printf("%s %s[%ld]: neon %g, generic %g\n", c.name, neon.name, static_cast<long>(i), a, b);
      return false;
    }
    most = std::fmax(most, std::fabs(b));
    worst = std::fmax(worst, std::fabs(a - b));
  }
  if (worst <= tolerance * (1.0f + most)) return true;
  std::printf("%s %s, dtype %d: off by %g beside %g\n", c.name, neon.name, static_cast<int>(dtype), worst, most);
  return false;
}

}  // namespace

int main() {
  const Case cases[] = {
      {"tiled", {33, 0, 70}, {130, 5, 97}, 2, 1, 64, 64, false, false, false, 0.0f, 0.0f},
      {"grouped, odd dims", {9, 40}, {31, 70}, 2, 3, 19, 33, true, true, false, 0.0f, 0.0f},
      {"deep", {17}, {40}, 1, 1, 256, 200, false, false, false, 0.0f, 0.0f},
      {"few", {1, 2, 1}, {300, 40, 1}, 3, 1, 64, 48, false, true, false, 2.0f, 0.0f},
      {"few, ranges, dropout", {2, 1}, {77, 130}, 2, 2, 40, 24, true, false, false, 0.0f, 0.3f},
      {"long", {3, 80}, {2400, 2500}, 1, 1, 8, 8, false, false, false, 0.0f, 0.0f},
      {"everything", {20, 66}, {120, 31}, 2, 2, 24, 40, true, true, true, 5.0f, 0.2f},
  };
  if (!isa_available(Isa::neon)) {
    std::printf("neon is not available\n");
    return 1;
  }
  int faults = 0;
  for (const Case& c : cases) {
    for (DType dtype : {DType::f32, DType::bf16, DType::f16}) {
      const auto neon = run(c, dtype, Isa::neon), generic = run(c, dtype, Isa::generic);
      for (size_t i = 0; i < neon.size(); ++i) faults += !agree(c, neon[i], generic[i], dtype);
    }
  }
  if (faults == 0) std::printf("neon agrees with generic\n");
  return faults != 0;
}
