// Column sums of squares on the CPU. Torch-free; see sqnorm_impl.h.
#pragma once

#include "../common/dtype.h"

namespace wanda::cpu {

struct SqnormParams {
  float* sqnorm;           // [sequences, cols] contiguous: the sum over each sequence is added to it
  const void* x;           // [sequences, tokens, cols], unit column stride
  const bool* token_mask;  // nullptr, or [sequences, tokens] contiguous: false = the token does not count
  int64_t tokens;          // per sequence
  int64_t cols;
  int64_t sequence_stride;  // of x, elements
  int64_t token_stride;     // of x, elements
  Dtype dtype;
};

// Sequence `sequence`, columns [begin, end). One thread; disjoint calls may run at the same time.
// A column's sum takes its tokens in order in float32, each square rounded before it is added (no fused
// multiply-add): the order and rounding of torch.norm(x.t(), dim=1), on which the official code's masks
// stand. After every kChunk tokens the sum goes to a float64 total, which is rounded once to float32 and
// added to sqnorm: the same bits for every instruction set, number of threads and split of columns.
constexpr int64_t kChunk = 4096;
void sqnorm_scalar(const SqnormParams& params, int64_t sequence, int64_t begin, int64_t end);
void sqnorm_avx2(const SqnormParams& params, int64_t sequence, int64_t begin, int64_t end);
void sqnorm_avx512(const SqnormParams& params, int64_t sequence, int64_t begin, int64_t end);

}  // namespace wanda::cpu
