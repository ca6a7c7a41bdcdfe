// torch operator of retrieval. Its schema lives in fastxattn/ops/retrieval/schema.py.
#include <tuple>
#include <vector>

#include "bindings/torch_glue.h"
#include "retrieval/retrieval.h"

namespace fastxattn {
namespace {

std::tuple<Tensor, Tensor> topk_similarity_cpu(const Tensor& queries, const Tensor& corpus,
                                               const OptionalTensor& factor, int64_t k, int64_t first) {
  STD_TORCH_CHECK(queries.dim() == 2 && queries.is_contiguous() && queries.scalar_type() == ScalarType::Float,
                  "fastxattn: queries must be a contiguous float32 matrix");
  STD_TORCH_CHECK(
      corpus.dim() == 2 && corpus.size(1) == queries.size(1) && (corpus.size(1) == 1 || corpus.stride(1) == 1),
      "fastxattn: corpus must be a matrix of the queries' features with stride 1 along them");
  STD_TORCH_CHECK(k >= 1 && k <= INT32_MAX, "fastxattn: k must be in 1..2^31 - 1; got ", k);
  STD_TORCH_CHECK(queries.size(1) >= 1, "fastxattn: queries must have at least 1 feature");
  STD_TORCH_CHECK(first >= 0 && first <= INT64_MAX - corpus.size(0),
                  "fastxattn: first must be at least 0, and small enough to number the corpus from; got ", first);
  RetrievalParams p;
  switch (corpus.scalar_type()) {
    case ScalarType::Char: p.type = CorpusType::i8; break;
    case ScalarType::BFloat16: p.type = CorpusType::bf16; break;
    case ScalarType::Half: p.type = CorpusType::f16; break;
    case ScalarType::Float: p.type = CorpusType::f32; break;
    default: STD_TORCH_CHECK(false, "fastxattn: corpus must be float32, bfloat16, float16 or int8");
  }
  STD_TORCH_CHECK(!factor.has_value() || (factor->dim() == 1 && factor->size(0) == corpus.size(0) &&
                                          factor->is_contiguous() && factor->scalar_type() == ScalarType::Float),
                  "fastxattn: factor must be a contiguous float32 vector, one entry a corpus row");
  p.queries = static_cast<const float*>(queries.const_data_ptr());
  p.corpus = corpus.const_data_ptr();
  p.stride = corpus.size(0) > 1 ? corpus.stride(0) : corpus.size(1);
  p.factor = data_or_null<float>(factor);
  p.q = queries.size(0), p.rows = corpus.size(0), p.d = queries.size(1), p.k = k, p.first = first;
  Tensor scores = empty_cpu({p.q, k}, ScalarType::Float);
  Tensor indices = empty_cpu({p.q, k}, ScalarType::Long);
  p.scores = static_cast<float*>(scores.mutable_data_ptr());
  p.indices = static_cast<int64_t*>(indices.mutable_data_ptr());
  const Parallel parallel = torch_parallel();
  std::vector<char> scratch(static_cast<size_t>(retrieval_scratch(p) * parallel.workers + 64));
  topk_similarity(p, reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(scratch.data()) + 63) / 64 * 64), parallel);
  return {scores, indices};
}

}  // namespace
}  // namespace fastxattn

STABLE_TORCH_LIBRARY_IMPL(fastxattn, CPU, m) {
  m.impl("topk_similarity_cpu", FXA_OPERATOR(&fastxattn::topk_similarity_cpu));
}
