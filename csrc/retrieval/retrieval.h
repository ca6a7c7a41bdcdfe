// Parameters of fused similarity and top-k.
#pragma once

#include <cstdint>

#include "core/scalar.h"

namespace fastxattn {

enum class CorpusType : int32_t { f32 = 0, bf16 = 1, f16 = 2, i8 = 3 };

struct RetrievalParams {
  const float* queries = nullptr;  // (q, d) float32, contiguous
  const void* corpus = nullptr;    // (rows, d), last stride 1
  CorpusType type = CorpusType::f32;
  int64_t stride = 0;             // elements from one corpus row to the next
  const float* factor = nullptr;  // (rows) multiplies each row's scores (1 / |x|, int8 scales); null: 1
  int64_t q = 0, rows = 0, d = 0, k = 0;
  int64_t kept = 0;            // min(k, rows of a chunk): length of a chunk's list of best rows; set by the dispatcher
  int64_t first = 0;           // index of the first corpus row, for chunks of a larger corpus
  float* scores = nullptr;     // (q, k) best scores, descending; -inf where there are fewer rows than k
  int64_t* indices = nullptr;  // (q, k) their rows; -1 where there are none. Of equal scores the first row wins
};

// Rows of the corpus that one task scores, and queries it scores them against.
inline constexpr int64_t kCorpusChunk = 8192;
inline constexpr int64_t kQueryBlock = 64;
inline constexpr int64_t kCorpusBlock = 192;

int64_t retrieval_scratch(const RetrievalParams& p);

struct Parallel;
void topk_similarity(RetrievalParams p, char* scratch, const Parallel&);

}  // namespace fastxattn
