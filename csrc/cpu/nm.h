// N:M selection on the CPU: the M - N smallest |W| * norm of every M columns. Torch-free; see nm_impl.h.
#pragma once

#include "../common/dtype.h"

namespace wanda::cpu {

struct NmParams {
  void* weight;        // [rows, cols], unit column stride, rows `row_stride` elements apart
  const float* norm;   // [cols]
  bool* mask;          // nullptr: pruned weights become +0 in place.
                       // Else [rows, cols] contiguous: receives true = pruned, `weight` is only read.
  float* score_sums;   // nullptr, or [rows, 2]: sum of the squared scores that are pruned, and of all
  int64_t cols;        // a multiple of m
  int64_t row_stride;  // elements
  int64_t n;           // kept in each group
  int64_t m;           // size of a group, 0 < n < m
  Dtype dtype;
};

// Rows [begin, end). One thread; several threads may work on disjoint ranges.
void nm_scalar(const NmParams& params, int64_t begin, int64_t end);
void nm_avx2(const NmParams& params, int64_t begin, int64_t end);
void nm_avx512(const NmParams& params, int64_t begin, int64_t end);

}  // namespace wanda::cpu
