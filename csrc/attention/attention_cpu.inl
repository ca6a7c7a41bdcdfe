// The kernels of one instruction set; attention_cpu_<isa>.cpp includes this and nothing else.
#include "attention/attention_bias.inl"
#include "attention/attention_few.inl"

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
static size_t backward_bytes(const AttentionParams& p, int64_t lanes, int64_t keys) {
  Arena arena{nullptr};
  BackwardScratch<T>(p, arena, lanes, keys);
  return arena.used;
}

// Scratch memory for an item of so many lanes and keys; 0, 0: for a bias item.
size_t attention_backward_scratch(const AttentionParams& p, int64_t lanes, int64_t keys) {
  const int64_t held = lanes > 0 ? lanes_held(lanes) : kBackwardLanes;
  const int64_t sums = keys > 0 ? keys_held(lanes, keys) : kKeyBlock;
  switch (p.dtype) {
    case DType::bf16: return backward_bytes<bf16_t>(p, held, sums);
    case DType::f16: return backward_bytes<f16_t>(p, held, sums);
    default: return backward_bytes<float>(p, held, sums);
  }
}

void attention_backward_item(const AttentionParams& p, const AttentionGradients& g, const BackwardItem& item,
                             float* workspace, void* scratch) {
  const Arena arena{static_cast<char*>(scratch)};
  switch (p.dtype) {
    case DType::bf16: return backward_item<bf16_t>(p, g, item, workspace, arena);
    case DType::f16: return backward_item<f16_t>(p, g, item, workspace, arena);
    default: return backward_item<float>(p, g, item, workspace, arena);
  }
}

void attention_bias_item(const AttentionParams& p, const AttentionGradients& g, const BiasItem& item, float* sums,
                         void* scratch) {
  const Arena arena{static_cast<char*>(scratch)};
  switch (p.dtype) {
    case DType::bf16: return bias_item<bf16_t>(p, g, item, sums, arena);
    case DType::f16: return bias_item<f16_t>(p, g, item, sums, arena);
    default: return bias_item<float>(p, g, item, sums, arena);
  }
}

}  // namespace fastxattn::FXA_ISA
