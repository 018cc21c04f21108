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

// Sums of kRows rows, `row_sums` [kRows, 2], of which the first `count` there are. `slots` [32 * 2 * kRows]
// in shared memory, of which the caller sees to it that another barrier passes before they are written again.
template <int kRows>
WANDA_DEVICE void write_sums(const ScoreSums (&sums)[kRows], int64_t count, float* row_sums, float* slots) {
  constexpr int kSums = 2 * kRows;
  float value[kSums];
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    value[2 * r] = sums[r].pruned;
    value[2 * r + 1] = sums[r].all;
  }
  const float own = warp_sums(value);
  const int thread = threadIdx.x;
  if (lane_of(thread) < kSums) slots[thread / kWarp * kSums + lane_of(thread)] = own;
  __syncthreads();
  if (thread >= kSums || thread >= 2 * count) return;
  float total = 0;
#pragma unroll 1
  for (int w = 0; w < static_cast<int>(blockDim.x) / kWarp; ++w)
    total = __fadd_rn(total, slots[w * kSums + thread]);
  row_sums[thread] = total;
}

struct RowsAnyShared {
  alignas(16) uint32_t bins[256];
  float slots[2 * kWarp];
};

// A block takes whole rows of a matrix, one after the other, each in stretches of `segment_cols` (the row
// itself, or the groups of an N:M pattern that nm.cuh has no shape for) of which `params.k` elements are
// pruned.
template <Dtype kDtype>
__global__ void __launch_bounds__(512) rows_any_kernel(const RowsParams params, const int64_t segment_cols) {
  WANDA_DYNAMIC_SHARED(memory);
  RowsAnyShared& shared = *reinterpret_cast<RowsAnyShared*>(memory);
  const float* const norm = norm_at(params, 0);
  const int64_t first_row = first_row_of(params);
  for (int64_t row = first_row + blockIdx.x; row < first_row + params.norm_rows; row += gridDim.x) {
    ScoreSums sums[1];
    for (int64_t col = 0; col < params.cols; col += segment_cols) {
      const Segment<kDtype> segment{
          static_cast<typename Element<kDtype>::Bits*>(params.weight) + row * params.row_stride + col,
          norm + col, params.mask == nullptr ? nullptr : params.mask + row * params.cols + col, segment_cols,
          params.k};
      const ScoreSums part = select_segment<kDtype>(segment, shared.bins);
      sums[0].pruned = __fadd_rn(sums[0].pruned, part.pruned);
      sums[0].all = __fadd_rn(sums[0].all, part.all);
    }
    if (params.score_sums != nullptr) {
      write_sums(sums, 1, params.score_sums + 2 * row, shared.slots);
      __syncthreads();  // where all of a row goes, no other barrier stands before the next one's sums
    }
  }
}

}  // namespace wanda::cuda
