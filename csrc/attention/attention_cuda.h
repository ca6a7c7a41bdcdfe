// Variable-length cross-attention on CUDA devices: the problem as the kernels receive it, by value. Torch-free.
//
// Slots, rows and their indices mean what they mean in attention.h. Offsets and indices are clamped to the data by the
// kernels, since the host does not see them. Strides count elements; the last axis is contiguous.
#pragma once

#include <cstdint>

#include "core/scalar.h"

namespace fastxattn {

// Keys are cut into chunks where a sequence has few rows (queries x group) and many keys, so that it still fills a
// device. Its own lengths decide, not the batch's, so that a result is the same whatever else is in the batch.
inline constexpr int kCutRows = 64;      // at most
inline constexpr int kCutLength = 1024;  // keys, at least
inline constexpr int kChunkKeys = 512;   // keys per chunk, at least
inline constexpr int kMostChunks = 32;   // longer sequences get longer chunks

struct AttentionKernelParams {
  const void* query = nullptr;            // (rows_q, heads, head_dim)
  const void* key = nullptr;              // (rows_k, kv_heads, head_dim)
  const void* value = nullptr;            // (rows_k, kv_heads, value_dim)
  int64_t query_row = 0, query_head = 0;  // strides of query
  int64_t key_row = 0, key_head = 0;      // strides of key
  int64_t value_row = 0, value_head = 0;  // strides of value
  int32_t rows_q = 0, rows_k = 0;         // rows of query; rows of key and value
  int32_t slots_q = 0, slots_k = 0;       // length of the index, or rows without one
  int32_t batch = 0;                      // sequences
  int32_t kv_heads = 0, group = 1;        // heads = kv_heads * group
  int32_t head_dim = 0, value_dim = 0;    // each in 1..256, of float32 in 1..128
  // Whether every row of query, key, value and grad_out may be read in pieces of 16 bytes: pointers, strides and dims
  // are multiples of that.
  bool aligned = false;

  const int32_t* cu_q = nullptr;                // (batch + 1,) first query slot of each sequence
  const int32_t* cu_k = nullptr;                // (batch + 1,) first key slot of each sequence
  const int32_t* used_q = nullptr;              // (batch,) query slots in use, null: all
  const int32_t* used_k = nullptr;              // (batch,) key slots in use, null: all
  const int32_t* index_q = nullptr;             // (slots_q,) row of each query slot, null: the slot itself
  const int32_t* index_k = nullptr;             // (slots_k,) row of each key slot, null: the slot itself
  const int32_t* kv_range = nullptr;            // (rows_q, 2) visible key slots [start, end) by query row, null: all
  const float* key_bias = nullptr;              // added to the scaled, capped score by key row, null: none
  int64_t key_bias_row = 0, key_bias_head = 0;  // its strides; head stride 0 when it has no head axis
  float scale = 1.0f;                           // multiplies query . key
  float softcap = 0.0f;                         // score becomes softcap * tanh(score / softcap); 0: off

  // Results of forward, which writes the rows that slots stand for and leaves the others.
  void* out = nullptr;   // (rows_q, heads, value_dim) contiguous
  float* lse = nullptr;  // (heads, rows_q) contiguous
  // Results of chunks, from which the merge kernel makes those rows of out and lse. Chunk c of the sequence whose keys
  // begin at slot k has the place k / kChunkKeys + c.
  int32_t chunks = 0;         // places: slots_k / kChunkKeys; 0: keys are never cut
  int32_t part_rows = 0;      // rows per place: kCutRows, or as many as there are
  float* part_out = nullptr;  // (chunks, kv_heads, part_rows, value_dim)
  float* part_lse = nullptr;  // (chunks, kv_heads, part_rows)
};

struct AttentionKernelGradients {
  const void* grad_out = nullptr;               // (rows_q, heads, value_dim)
  int64_t grad_out_row = 0, grad_out_head = 0;  // its strides
  const float* grad_lse = nullptr;              // (heads, rows_q) contiguous, null: zero
  // Between the kernels, both (heads, rows_q): sum(P dP) - grad_lse, and for float32 the sum of the weights as
  // recomputed from the rounded lse, by which they are divided.
  float* delta = nullptr;
  float* norm = nullptr;
  // Results, contiguous, null: not asked for. Those of keys are by slot: several slots may stand for one row.
  void* grad_query = nullptr;      // (rows_q, heads, head_dim); rows without a slot are left
  void* grad_key = nullptr;        // (slots_k, kv_heads, head_dim)
  void* grad_value = nullptr;      // (slots_k, kv_heads, value_dim)
  float* grad_key_bias = nullptr;  // (slots_k, heads) with a head axis, else (slots_k, kv_heads) to be summed
  bool key_bias_has_heads = false;
};

// Launches on `stream` (a cudaStream_t); the message of what went wrong, or null. `few`: only the sequences that the
// kernel for compute capability 9.0 leaves.
#define FXA_ATTENTION_DTYPES(X) X(f16) X(bf16) X(f32)
#define FXA_DECLARE_DTYPE(name)                                                                            \
  const char* attention_forward_##name(const AttentionKernelParams& p, bool few, void* stream);            \
  const char* attention_backward_##name(const AttentionKernelParams& p, const AttentionKernelGradients& g, \
                                        void* stream);
FXA_ATTENTION_DTYPES(FXA_DECLARE_DTYPE)
#undef FXA_DECLARE_DTYPE

// The same for a dtype that is known at run time.
const char* attention_forward_cuda(const AttentionKernelParams& p, DType dtype, void* stream);
const char* attention_backward_cuda(const AttentionKernelParams& p, const AttentionKernelGradients& g, DType dtype,
                                    void* stream);

}  // namespace fastxattn
