// The kernels, compiled once per instruction set.
#include "importance/importance_few.inl"
#include "importance/importance_tiled.inl"

namespace fastxattn::FXA_ISA {

template <class T>
static void importance_item(const ImportanceParams& params, const ImportanceItem& item, int64_t most_keys,
                            Arena arena) {
  const ImportanceScratch<T> s(params.attention, most_keys, arena);
  if (item.few) {
    importance_few<T>(params, item, s);
  } else {
    importance_tiled<T>(params, item, s);
  }
}

size_t importance_scratch(const AttentionParams& p, int64_t most_keys) {
  Arena arena{nullptr};
  switch (p.dtype) {
    case DType::bf16: ImportanceScratch<bf16_t>(p, most_keys, arena); break;
    case DType::f16: ImportanceScratch<f16_t>(p, most_keys, arena); break;
    default: ImportanceScratch<float>(p, most_keys, arena); break;
  }
  return arena.used;
}

void importance_of_keys(const ImportanceParams& p, const ImportanceItem& item, int64_t most_keys, void* scratch) {
  const Arena arena{static_cast<char*>(scratch)};
  switch (p.attention.dtype) {
    case DType::bf16: return importance_item<bf16_t>(p, item, most_keys, arena);
    case DType::f16: return importance_item<f16_t>(p, item, most_keys, arena);
    default: return importance_item<float>(p, item, most_keys, arena);
  }
}

}  // namespace fastxattn::FXA_ISA
