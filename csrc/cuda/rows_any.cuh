// Selection for rows of any kind: any width, any alignment, norms of any sign. Slow and simple beside
// rows.cuh, which sends it the rows that its own assumptions do not hold for.
//
// Algorithm: an element's value is its score's order above its column, and no two are equal: the k smallest
// are those below the value of rank k. A radix descent finds that value eight bits at a time.
//
// Assumes: fewer than 2^32 columns. Negative norms, -0.0, NaN and ties order as in torch.sort.
//
// One thread: every blockDim.x-th element, in every pass.
//
// Bytes: reads W and norm once for each 8 bits of (score, column), 6 times up to 65,536 columns, mostly from
// L2; then once more to write.
#pragma once

#include "block.cuh"
#include "score.cuh"

namespace wanda::cuda {

// A row, or a stretch of one, within which `k` elements are pruned.
template <Dtype kDtype>
struct Segment {
  typename Element<kDtype>::Bits* weight;
  const float* norm;
  bool* mask;  // nullptr: prune in place
  int64_t cols;
  int64_t k;
};

struct ScoreSums {
  float pruned = 0, all = 0;  // of this thread's elements, squared
};

// A call rather than inlined code: it must not cost the fast kernels registers. `bins` [256], shared.
template <Dtype kDtype>
__device__ __noinline__ ScoreSums select_segment(Segment<kDtype> segment, uint32_t* bins) {
  int column_bits = 8;
  while (column_bits < 32 && (segment.cols - 1) >> column_bits != 0) column_bits += 8;
  const auto value_at = [&](int64_t col) {
    const float score = score_of<kDtype>(segment.weight[col], segment.norm[col]);
    return static_cast<uint64_t>(ordered_key(score)) << column_bits | static_cast<uint64_t>(col);
  };
  uint64_t limit = ~uint64_t{0};  // prune what is below; k == cols prunes all
  if (segment.k < segment.cols) {
    limit = radix_select(value_at, segment.cols, static_cast<uint32_t>(segment.k), 24 + column_bits, bins);
  }
  ScoreSums sums;
  for (int64_t col = threadIdx.x; col < segment.cols; col += blockDim.x) {
    const bool pruned = value_at(col) < limit;
    const float score = score_of<kDtype>(segment.weight[col], segment.norm[col]);
    const float square = __fmul_rn(score, score);
    sums.all = __fadd_rn(sums.all, square);
    if (pruned) sums.pruned = __fadd_rn(sums.pruned, square);
    if (segment.mask != nullptr) {
      segment.mask[col] = pruned;
    } else if (pruned) {
      segment.weight[col] = 0;
    }
  }
  return sums;
}

// `slots` [2][32], shared.
WANDA_DEVICE void write_sums(ScoreSums sums, float* row_sums, float (*slots)[kWarp]) {
  const float pruned = block_sum(sums.pruned, slots[0]);
  const float all = block_sum(sums.all, slots[1]);
  if (threadIdx.x == 0) {
    row_sums[0] = pruned;
    row_sums[1] = all;
  }
}

struct RowsAnyShared {
  alignas(16) uint32_t bins[256];
  float slots[2][kWarp];
};

// A block takes whole rows, one after the other, each in stretches of `segment_cols` (the row itself, or the
// groups of an N:M pattern that nm.cuh has no shape for) of which `params.k` elements are pruned.
template <Dtype kDtype>
__global__ void __launch_bounds__(512) rows_any_kernel(const RowsParams params, const int64_t segment_cols) {
  WANDA_DYNAMIC_SHARED(memory);
  RowsAnyShared& shared = *reinterpret_cast<RowsAnyShared*>(memory);
  for (int64_t row = blockIdx.x; row < params.rows; row += gridDim.x) {
    ScoreSums sums;
    for (int64_t col = 0; col < params.cols; col += segment_cols) {
      const Segment<kDtype> segment{
          static_cast<typename Element<kDtype>::Bits*>(params.weight) + row * params.row_stride + col,
          params.norm + col, params.mask == nullptr ? nullptr : params.mask + row * params.cols + col,
          segment_cols, params.k};
      const ScoreSums part = select_segment<kDtype>(segment, shared.bins);
      sums.pruned = __fadd_rn(sums.pruned, part.pruned);
      sums.all = __fadd_rn(sums.all, part.all);
    }
    if (params.score_sums != nullptr) write_sums(sums, params.score_sums + 2 * row, shared.slots);
  }
}

}  // namespace wanda::cuda
