// The kernels of one instruction set; bidirectional_cpu_<isa>.cpp includes this and nothing else.
#include "bidirectional/bidirectional_backward.inl"
#include "bidirectional/bidirectional_forward.inl"

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

size_t bidirectional_scratch(const BidirectionalParams& p, const BidirectionalItem& item, bool backward) {
  return by_dtype(p.dtype, [&]<class T>(T*) {
    Arena arena{nullptr};
    if (backward) {
      BidirectionalBackward<T>(p, item, arena);
    } else {
      BidirectionalForward<T>(p, item, arena);
    }
    return arena.used;
  });
}

void bidirectional_forward_item(const BidirectionalParams& p, const BidirectionalItem& item, float* workspace,
                                void* scratch) {
  by_dtype(p.dtype,
           [&]<class T>(T*) { bidirectional_forward_item<T>(p, item, workspace, Arena{static_cast<char*>(scratch)}); });
}

void bidirectional_forward_merge(const BidirectionalParams& p, const BidirectionalMerge& merge, float* workspace) {
  by_dtype(p.dtype, [&]<class T>(T*) { finish_keys<T>(p, merge, workspace + merge.first.partial); });
}

void bidirectional_backward_item(const BidirectionalParams& p, const BidirectionalItem& item, bool sums_only,
                                 float* workspace, void* scratch) {
  by_dtype(p.dtype, [&]<class T>(T*) {
    bidirectional_backward_item<T>(p, item, sums_only, workspace, Arena{static_cast<char*>(scratch)});
  });
}

void bidirectional_backward_merge(const BidirectionalParams& p, const BidirectionalMerge& merge, bool sums_only,
                                  float* workspace) {
  by_dtype(p.dtype,
           [&]<class T>(T*) { finish_key_gradients<T>(p, merge, workspace + merge.first.partial, sums_only); });
}

void bidirectional_center(const BidirectionalParams& p, int side, int64_t begin, int64_t end) {
  by_dtype(p.dtype, [&]<class T>(T*) { center_rows<T>(p, side, begin, end); });
}

}  // namespace fastxattn::FXA_ISA
