// The kernels of one instruction set; attention_cpu_<isa>.cpp includes this and nothing else.
#include "attention/attention_forward.inl"

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

void attention_forward_item(const AttentionParams& p, const ForwardItem& item, float* workspace, void* scratch) {
  const Arena arena{static_cast<char*>(scratch)};
  switch (p.dtype) {
    case DType::bf16: return forward_tiled<bf16_t>(p, item, workspace, arena);
    case DType::f16: return forward_tiled<f16_t>(p, item, workspace, arena);
    default: return forward_tiled<float>(p, item, workspace, arena);
  }
}

void attention_merge(const AttentionParams& p, const ForwardMerge& merge, const float* workspace) {
  switch (p.dtype) {
    case DType::bf16: return merge_rows<bf16_t>(p, merge, workspace);
    case DType::f16: return merge_rows<f16_t>(p, merge, workspace);
    default: return merge_rows<float>(p, merge, workspace);
  }
}

}  // namespace fastxattn::FXA_ISA
