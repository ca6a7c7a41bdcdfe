// Chunks of the corpus over threads, then their lists merged in order of rows, so that ties keep the first row.
#include <algorithm>
#include <vector>

#include "core/cpu/isa.h"
#include "core/cpu/parallel.h"
#include "retrieval/retrieval.h"

namespace fastxattn {

FXA_CPU_KERNEL(void, retrieval_chunk, (const RetrievalParams&, int64_t, int64_t, float*, int64_t*, char*))

namespace {

// NaN ranks above everything, as in torch.topk.
bool above(float x, float y) { return x > y || (x != x && y == y); }

void merge(const RetrievalParams& p, int64_t query, int64_t chunks, const float* scores, const int64_t* rows) {
  const int64_t block = query / kQueryBlock, lane = query % kQueryBlock, blocks = (p.q + kQueryBlock - 1) / kQueryBlock;
  std::vector<int64_t> next(static_cast<size_t>(chunks), 0);
  for (int64_t i = 0; i < p.k; ++i) {
    int64_t from = -1, at = 0;
    for (int64_t c = 0; c < chunks; ++c) {
      if (next[c] >= p.kept) continue;
      const int64_t here = ((c * blocks + block) * kQueryBlock + lane) * p.kept + next[c];
      if (rows[here] >= 0 && (from < 0 || above(scores[here], scores[at]))) from = c, at = here;
    }
    p.scores[query * p.k + i] = from < 0 ? -__builtin_inff() : scores[at];
    p.indices[query * p.k + i] = from < 0 ? -1 : rows[at];
    if (from >= 0) ++next[from];
  }
}

}  // namespace

int64_t retrieval_scratch(const RetrievalParams& p) {
  const int64_t depth = (p.d + 31) / 32 * 32;
  return 4 * ((2 * kQueryBlock + kCorpusBlock) * depth + (kCorpusBlock + 1) * kQueryBlock + 1024) / 64 * 64;
}

void topk_similarity(RetrievalParams p, char* scratch, const Parallel& parallel) {
  const int64_t chunks = (p.rows + kCorpusChunk - 1) / kCorpusChunk, blocks = (p.q + kQueryBlock - 1) / kQueryBlock;
  const auto chunk = retrieval_chunk_for(active_isa());
  // A chunk cannot fill a longer list: memory follows from the data, whatever k is.
  p.kept = std::min({p.k, p.rows, kCorpusChunk});
  const int64_t list = kQueryBlock * p.kept, bytes = retrieval_scratch(p);
  std::vector<float> scores(static_cast<size_t>(chunks * blocks * list));
  std::vector<int64_t> rows(scores.size(), -1);
  for_each_task(parallel, chunks * blocks, [&](int64_t task, int64_t worker) {
    chunk(p, task / blocks, task % blocks, scores.data() + task * list, rows.data() + task * list,
          scratch + worker * bytes);
  });
  for_each_task(parallel, p.q, [&](int64_t query, int64_t) { merge(p, query, chunks, scores.data(), rows.data()); });
}

}  // namespace fastxattn
