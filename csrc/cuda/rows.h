// Row selection on CUDA: the k smallest |W| * norm of each row. Torch-free; see rows.cuh.
#pragma once

#include "../common/dtype.h"

struct CUstream_st;

namespace wanda::cuda {

struct RowsParams {
  void* weight;       // [rows, cols], unit column stride, rows `row_stride` elements apart
  const float* norm;  // [cols]
  bool* mask;         // nullptr: pruned weights become +0 in place.
                      // Else [rows, cols] contiguous: receives true = pruned, `weight` is only read.
  float* score_sums;  // nullptr, or [rows, 2]: sum of the squared scores that are pruned, and of all.
                      // Not together with `mask`
  int64_t rows;
  int64_t cols;        // >= 1, < 2^32
  int64_t row_stride;  // elements
  int64_t k;           // how many of each row to prune, 0 <= k <= cols
  Dtype dtype;
};

// Enqueues on `stream`. Returns a cudaError_t, 0 on success.
int launch_rows(const RowsParams& params, CUstream_st* stream);

}  // namespace wanda::cuda
