// The kernels, compiled once per instruction set.
#include "co_attention/co_attention_backward.inl"
#include "co_attention/co_attention_forward.inl"

namespace fastxattn::FXA_ISA {

// Calls f with a null pointer to the element type.
template <class F>
static auto by_dtype(DType dtype, F&& f) {
  switch (dtype) {
    case DType::bf16: return f(static_cast<bf16_t*>(nullptr));
    case DType::f16: return f(static_cast<f16_t*>(nullptr));
    default: return f(static_cast<float*>(nullptr));
  }
}

size_t co_attention_scratch(const CoAttentionParams& p, const CoAttentionItem& item, bool backward) {
  return by_dtype(p.dtype, [&]<class T>(T*) {
    Arena arena{nullptr};
    if (backward) {
      CoAttentionBackward<T>(p, item, arena);
    } else {
      CoAttentionForward<T>(p, item, arena);
    }
    return arena.used;
  });
}

void co_attention_forward_item(const CoAttentionParams& p, const CoAttentionItem& item, float* workspace,
                               void* scratch) {
  by_dtype(p.dtype,
           [&]<class T>(T*) { co_attention_forward_item<T>(p, item, workspace, Arena{static_cast<char*>(scratch)}); });
}

void co_attention_forward_merge(const CoAttentionParams& p, const CoAttentionMerge& merge, float* workspace) {
  by_dtype(p.dtype, [&]<class T>(T*) { finish_keys<T>(p, merge, workspace + merge.first.partial); });
}

void co_attention_backward_item(const CoAttentionParams& p, const CoAttentionItem& item, bool sums_only,
                                float* workspace, void* scratch) {
  by_dtype(p.dtype, [&]<class T>(T*) {
    co_attention_backward_item<T>(p, item, sums_only, workspace, Arena{static_cast<char*>(scratch)});
  });
}

void co_attention_backward_merge(const CoAttentionParams& p, const CoAttentionMerge& merge, bool sums_only,
                                 float* workspace) {
  by_dtype(p.dtype,
           [&]<class T>(T*) { finish_key_gradients<T>(p, merge, workspace + merge.first.partial, sums_only); });
}

void co_attention_center(const CoAttentionParams& p, int side, int64_t begin, int64_t end) {
  by_dtype(p.dtype, [&]<class T>(T*) { center_rows<T>(p, side, begin, end); });
}

}  // namespace fastxattn::FXA_ISA
