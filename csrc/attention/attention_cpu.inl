// The kernels, compiled once per instruction set.
#include "attention/attention_bias.inl"
#include "attention/attention_few_backward.inl"

namespace fastxattn::FXA_ISA {

size_t attention_forward_scratch(const AttentionParams& p) {
  Arena arena{nullptr};
  switch (p.dtype) {
    case DType::bf16: ForwardScratch<bf16_t>(p, arena); break;
    case DType::f16: ForwardScratch<f16_t>(p, arena); break;
    default: ForwardScratch<float>(p, arena); break;
  }
  return arena.used;
}

template <class T>
static void forward_item(const AttentionParams& p, const ForwardItem& item, float* workspace, const Arena& arena) {
  if (item.few) {
    forward_few<T>(p, item, workspace, arena);
  } else {
    forward_tiled<T>(p, item, workspace, arena);
  }
}

void attention_forward_item(const AttentionParams& p, const ForwardItem& item, float* workspace, void* scratch) {
  const Arena arena{static_cast<char*>(scratch)};
  switch (p.dtype) {
    case DType::bf16: return forward_item<bf16_t>(p, item, workspace, arena);
    case DType::f16: return forward_item<f16_t>(p, item, workspace, arena);
    default: return forward_item<float>(p, item, workspace, arena);
  }
}

void attention_merge(const AttentionParams& p, const ForwardMerge& merge, const float* workspace) {
  switch (p.dtype) {
    case DType::bf16: return merge_rows<bf16_t>(p, merge, workspace);
    case DType::f16: return merge_rows<f16_t>(p, merge, workspace);
    default: return merge_rows<float>(p, merge, workspace);
  }
}

template <class T>
static size_t backward_bytes(const AttentionParams& p, const BackwardItem* item) {
  Arena arena{nullptr};
  if (item == nullptr) {
    BackwardScratch<T>(p, arena, kBackwardLanes, kKeyBlock, 1);
  } else {
    const Holding hold(kSumsDelta<T>, *item);
    if (item->few) {
      FewBackwardScratch<T>(p, arena, hold.tiles);
    } else {
      BackwardScratch<T>(p, arena, hold.lanes, hold.keys, hold.tiles);
    }
  }
  return arena.used;
}

// Scratch memory for an item; null: for a bias item.
size_t attention_backward_scratch(const AttentionParams& p, const BackwardItem* item) {
  switch (p.dtype) {
    case DType::bf16: return backward_bytes<bf16_t>(p, item);
    case DType::f16: return backward_bytes<f16_t>(p, item);
    default: return backward_bytes<float>(p, item);
  }
}

// Delta beforehand: planned for float32 only.
void attention_sum_item(const AttentionParams& p, const AttentionGradients& g, const BackwardItem& item,
                        float* workspace, void* scratch) {
  const Arena arena{static_cast<char*>(scratch)};
  if (item.few) {
    sum_few<float>(p, g, item, workspace, arena);
  } else {
    sum_item<float>(p, g, item, workspace, arena);
  }
}

template <class T>
static void backward_any(const AttentionParams& p, const AttentionGradients& g, const BackwardItem& item,
                         float* workspace, const Arena& arena) {
  if (item.few) {
    backward_few<T>(p, g, item, workspace, arena);
  } else {
    backward_item<T>(p, g, item, workspace, arena);
  }
}

void attention_backward_item(const AttentionParams& p, const AttentionGradients& g, const BackwardItem& item,
                             float* workspace, void* scratch) {
  const Arena arena{static_cast<char*>(scratch)};
  switch (p.dtype) {
    case DType::bf16: return backward_any<bf16_t>(p, g, item, workspace, arena);
    case DType::f16: return backward_any<f16_t>(p, g, item, workspace, arena);
    default: return backward_any<float>(p, g, item, workspace, arena);
  }
}

void attention_bias_item(const AttentionParams& p, const AttentionGradients& g, const BiasItem& item,
                         const int64_t* delta, const float* workspace, float* sums, void* scratch) {
  const Arena arena{static_cast<char*>(scratch)};
  switch (p.dtype) {
    case DType::bf16: return bias_item<bf16_t>(p, g, item, delta, workspace, sums, arena);
    case DType::f16: return bias_item<f16_t>(p, g, item, delta, workspace, sums, arena);
    default: return bias_item<float>(p, g, item, delta, workspace, sums, arena);
  }
}

}  // namespace fastxattn::FXA_ISA
