// Row selection on the CPU: the k smallest |W| * norm of each row. Torch-free; see rows_impl.h.
#pragma once

#include "../common/dtype.h"

namespace wanda::cpu {

struct RowsParams {
  void* weight;        // [rows, cols], unit column stride, rows `row_stride` elements apart
  const float* norm;   // [cols]
  bool* mask;          // nullptr: pruned weights become +0 in place.
                       // Else [rows, cols] contiguous: receives true = pruned, `weight` is only read.
  float* score_sums;   // nullptr, or [rows, 2]: sum of the squared scores that are pruned, and of all
  int64_t cols;        // >= 1
  int64_t row_stride;  // elements
  int64_t k;           // how many of each row to prune, 0 <= k <= cols
  Dtype dtype;
};

// Rows [begin, end). One thread; several threads may work on disjoint ranges.
void rows_scalar(const RowsParams& params, int64_t begin, int64_t end);
void rows_avx2(const RowsParams& params, int64_t begin, int64_t end);
void rows_avx512(const RowsParams& params, int64_t begin, int64_t end);

}  // namespace wanda::cpu
