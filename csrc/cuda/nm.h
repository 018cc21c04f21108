// N:M selection on CUDA: the M - N smallest |W| * norm of every M columns. Torch-free; see nm.cuh.
#pragma once

#include "../common/dtype.h"

struct CUstream_st;

namespace wanda::cuda {

struct NmParams {
  void* weight;       // [rows, cols], unit column stride, rows `row_stride` elements apart
  const float* norm;  // [cols]
  bool* mask;         // nullptr: pruned weights become +0 in place.
                      // Else [rows, cols] contiguous: receives true = pruned, `weight` is only read.
  float* score_sums;  // nullptr, or [rows, 2]: sum of the squared scores that are pruned, and of all.
                      // Not together with `mask`
  int64_t rows;
  int64_t cols;        // a multiple of m, < 2^32
  int64_t row_stride;  // elements
  int64_t n;           // kept in each group
  int64_t m;           // size of a group, 0 < n < m
  Dtype dtype;
};

// Enqueues on `stream`. Returns a cudaError_t, 0 on success.
int launch_nm(const NmParams& params, CUstream_st* stream);

}  // namespace wanda::cuda
