// Scores of one chunk of the corpus against one block of queries, keeping each query's best k.
//
// Queries lie along the lanes, packed once a task; corpus rows are broadcast from where they are, so a float32
// corpus is read exactly once and never copied. A row reaches the heaps only if it beats a query's k-th best.
#include "core/cpu/panels.h"
#include "retrieval/retrieval.h"

namespace fastxattn::FXA_ISA {

// Sorted insertion: k is small and insertions are rare once the list is warm. NaN counts as the highest score.
FXA_INLINE void insert_best(float score, int64_t row, float* scores, int64_t* rows, int64_t k) {
  int64_t at = k - 1;
  const bool nan = score != score;
  while (at > 0 && (scores[at - 1] < score || (nan && scores[at - 1] == scores[at - 1]))) {
    scores[at] = scores[at - 1];
    rows[at] = rows[at - 1];
    --at;
  }
  scores[at] = score;
  rows[at] = row;
}

static void widen(const RetrievalParams& p, int64_t first, int64_t rows, int64_t depth, float* out) {
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t at = (first + r) * p.stride;
    float* to = out + r * depth;
    for (int64_t c = 0; c < p.d; ++c) {
      switch (p.type) {
        case CorpusType::i8: to[c] = static_cast<const int8_t*>(p.corpus)[at + c]; break;
        case CorpusType::bf16: to[c] = to_f32(static_cast<const bf16_t*>(p.corpus)[at + c]); break;
        case CorpusType::f16: to[c] = to_f32(static_cast<const f16_t*>(p.corpus)[at + c]); break;
        default: to[c] = static_cast<const float*>(p.corpus)[at + c];
      }
    }
    for (int64_t c = p.d; c < depth; ++c) to[c] = 0;
  }
}

void retrieval_chunk(const RetrievalParams& p, int64_t chunk, int64_t query_block, float* scores, int64_t* rows,
                     char* scratch) {
  const int64_t depth = panel_depth<float>(p.d);
  const int64_t q0 = query_block * kQueryBlock, queries = p.q - q0 < kQueryBlock ? p.q - q0 : kQueryBlock;
  float* strip = reinterpret_cast<float*>(scratch);  // [depth][kQueryBlock]
  float* copy_q = strip + kQueryBlock * depth;       // padded queries
  float* copy = copy_q + kQueryBlock * depth;        // widened corpus rows
  float* tile = copy + kCorpusBlock * depth;         // [kCorpusBlock][kQueryBlock]
  float* worst = tile + kCorpusBlock * kQueryBlock;  // each query's k-th best; NaN lanes are dead
  int64_t ldq = 0;
  const float* query = f32_panel(p.queries + q0 * p.d, p.d, queries, p.d, copy_q, &ldq);
  pack_strips(query, ldq, queries, depth, strip);
  for (int64_t i = 0; i < queries * p.kept; ++i) {
    scores[i] = -__builtin_inff();
    rows[i] = -1;
  }
  const int64_t lanes = round_up(queries, W);
  for (int64_t i = 0; i < lanes; ++i) worst[i] = i < queries ? -__builtin_inff() : __builtin_nanf("");
  const int64_t begin = chunk * kCorpusChunk, end = p.rows < begin + kCorpusChunk ? p.rows : begin + kCorpusChunk;
  for (int64_t r0 = begin; r0 < end; r0 += kCorpusBlock) {
    const int64_t count = end - r0 < kCorpusBlock ? end - r0 : kCorpusBlock;
    const float* block = static_cast<const float*>(p.corpus) + r0 * p.stride;
    int64_t ld = p.stride;
    if (p.type != CorpusType::f32 || depth != p.d) {
      widen(p, r0, count, depth, copy);
      block = copy;
      ld = depth;
    }
    similarity(block, ld, count, strip, queries, depth, tile, kQueryBlock);
    for (int64_t r = 0; r < count; ++r) {
      const float factor = p.factor ? p.factor[r0 + r] : 1.0f;
      for (int64_t l = 0; l < lanes; l += W) {
        const vf x = load(tile + r * kQueryBlock + l) * splat(factor), least = load(worst + l);
        // Beaten, not yet full, or NaN where the list is not NaN throughout.
        const vi better =
            (x > least) | ((x != x) & (least == least)) | ((least == splat(-__builtin_inff())) & (x == least));
        int32_t some = 0;
#if defined(FXA_VEC512)
        some = _mm512_test_epi32_mask(reinterpret_cast<__m512i>(better), reinterpret_cast<__m512i>(better));
#else
        for (int i = 0; i < W; ++i) some |= better[i] != 0 ? 1 << i : 0;
#endif
        for (; some != 0; some &= some - 1) {
          const int64_t q = l + __builtin_ctz(static_cast<unsigned>(some));
          const float score = x[q - l];
          if (score == -__builtin_inff() && rows[q * p.kept + p.kept - 1] >= 0)
            continue;  // a full list keeps the first
          if (score == -__builtin_inff()) {
            int64_t at = 0;
            while (rows[q * p.kept + at] >= 0) ++at;
            rows[q * p.kept + at] = p.first + r0 + r;
            continue;
          }
          insert_best(score, p.first + r0 + r, scores + q * p.kept, rows + q * p.kept, p.kept);
          worst[q] = scores[q * p.kept + p.kept - 1];
        }
      }
    }
  }
}

}  // namespace fastxattn::FXA_ISA
