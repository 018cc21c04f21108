// Column sums of squares on CUDA. Torch-free; see sqnorm.cuh.
#pragma once

#include "../common/dtype.h"

struct CUstream_st;

namespace wanda::cuda {

struct SqnormParams {
  float* sqnorm;           // [sequences, cols] or [cols] (`is_shared`): each sequence's sum is added
  const void* x;           // [sequences, tokens, cols], unit column stride
  const bool* token_mask;  // nullptr, or [sequences, tokens] contiguous: false = the token does not count
  float* workspace;        // [sequences * chunks of tokens, cols], see sqnorm_chunks
  int64_t sequences;
  int64_t tokens;  // per sequence
  int64_t cols;
  int64_t sequence_stride;  // of x, elements
  int64_t token_stride;     // of x, elements
  bool is_shared;           // all sequences add to one row of sqnorm, in order
  Dtype dtype;
};

constexpr int64_t kSqnormChunk = 128;  // tokens of one partial sum

// Partial sums of a sequence.
inline int64_t sqnorm_chunks(int64_t tokens) { return (tokens + kSqnormChunk - 1) / kSqnormChunk; }

// Enqueues on `stream`. Returns a cudaError_t, 0 on success.
int launch_sqnorm(const SqnormParams& params, CUstream_st* stream);

}  // namespace wanda::cuda
