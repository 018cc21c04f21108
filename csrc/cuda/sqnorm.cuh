// Column sums of squares: sqnorm[j] += sum over tokens of x[t, j]^2, for each sequence.
//
// Algorithm: a block takes all tokens of a sequence and a few columns, so that no other block has a part of
// its sums: no workspace, no second launch, no atomics. 16 warps take 128 tokens at a time, eight each: lanes
// g * 4 to g * 4 + 3 the columns of 64 bytes of token g. A lane adds the squares of its tokens in float32
// with fused multiply-add, 32 of each 4,096; then its warp adds the eight tokens as a tree, and the first
// warp the sixteen warps. Sums of 4,096 tokens are added in float64, in order, rounded once and added to
// sqnorm. Nothing depends on the device: the same bits on every GPU, and for any split of whole sequences
// into calls.
//
// Segments are sequences of unequal length, whose ends only the device knows: the same launch, a block for
// each segment and its columns, which looks up the two ends and takes the tokens between them. A segment's
// sum has the bits that it would have alone. Where one expert has most tokens its blocks end last, as those
// of a sequence of so many; blocks of empty segments end at once. Ends are clamped to x, and descending ones
// make empty segments: bad ones read nothing outside.
//
// Assumes: nothing; where rows are 16-byte aligned and whole chunks of 16 bytes, kVector elements a lane,
// else one column a lane, of eight tokens, in the same order.
//
// One thread: eight loads on their way before it adds the first: 64 KB a block.
//
// Bytes an element: x in once, 64 bytes of a row at a time: whole sectors, and the blocks beside it read the
// rest of the same rows at the same time. 2,048 tokens by 4,096 columns are 128 blocks in bfloat16.
#pragma once

#include "score.cuh"

namespace wanda::cuda {

constexpr int kSqnormLoads = 8;  // of a thread, on their way together

template <Dtype kDtype, int kVector>
WANDA_DEVICE void add_squares(const uint4& chunk, float (&sum)[kVector]) {
  float value[kVector];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (kVector == 8) {
      unpack<kDtype>(component(chunk, i), value[2 * i], value[2 * i + 1]);
    } else {
      value[i] = __uint_as_float(component(chunk, i));
    }
  }
#pragma unroll
  for (int i = 0; i < kVector; ++i) sum[i] = __fmaf_rn(value[i], value[i], sum[i]);
}

// a[0] to a[kCount - 1] added as a tree: neighbours first.
template <int kCount>
WANDA_DEVICE float tree_sum(float (&a)[kCount]) {
#pragma unroll
  for (int step = 1; step < kCount; step *= 2) {
#pragma unroll
    for (int i = 0; i < kCount; i += 2 * step) a[i] = __fadd_rn(a[i], a[i + step]);
  }
  return a[0];
}

// The sums of this warp's tokens of a chunk, into `sums`, a place for each column of the block.
template <Dtype kDtype, int kVector, class Counts>
WANDA_DEVICE void sum_of_warp(const typename Element<kDtype>::Bits* x, int64_t stride, int64_t begin,
                              int64_t end, bool is_column, const Counts& counts, float* sums) {
  const int lane = threadIdx.x % kWarp;
  const int64_t first = begin + threadIdx.x / kWarp * kSqnormLoads;
  // Selected, not multiplied by 0: what a padding token holds may be NaN.
  const auto takes = [&](int64_t token) { return is_column && token < end && counts(token); };
  if constexpr (kVector == 1) {
    float sum[kSqnormLoads] = {};  // of a token each
    for (int64_t token = first; token < end; token += kSqnormRows) {
      float value[kSqnormLoads];
#pragma unroll
      for (int g = 0; g < kSqnormLoads; ++g) {
        value[g] = takes(token + g) ? to_float<kDtype>(x[(token + g) * stride]) : 0.0f;
      }
#pragma unroll
      for (int g = 0; g < kSqnormLoads; ++g) sum[g] = __fmaf_rn(value[g], value[g], sum[g]);
    }
    sums[lane] = tree_sum(sum);
  } else {
    float sum[kVector] = {};
    for (int64_t token = first + lane / kSqnormLanes; token < end; token += kSqnormLoads * kSqnormRows) {
      uint4 chunk[kSqnormLoads];
#pragma unroll
      for (int i = 0; i < kSqnormLoads; ++i) {
        const int64_t at = token + i * kSqnormRows;
        chunk[i] = takes(at) ? load_16(x + at * stride) : uint4{0, 0, 0, 0};
      }
#pragma unroll
      for (int i = 0; i < kSqnormLoads; ++i) add_squares<kDtype>(chunk[i], sum);
    }
#pragma unroll
    for (int step = kSqnormLanes; step < kWarp; step *= 2) {
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        sum[i] = __fadd_rn(sum[i], __shfl_xor_sync(kFullMask, sum[i], step));
      }
    }
    if (lane < kSqnormLanes) {
#pragma unroll
      for (int i = 0; i < kVector; ++i) sums[lane * kVector + i] = sum[i];
    }
  }
}

// A block: kSqnormCols<kVector> columns of one sequence or segment, or of all of them where they share a row
// of sqnorm.
template <Dtype kDtype, int kVector>
__global__ void __launch_bounds__(kSqnormWarps* kWarp, 2) sqnorm_columns_kernel(const SqnormParams params) {
  using Bits = typename Element<kDtype>::Bits;
  constexpr int kCols = kSqnormCols<kVector>;
  WANDA_DYNAMIC_SHARED(memory);
  float (*const sums)[kCols] = reinterpret_cast<float (*)[kCols]>(memory);  // [kSqnormWarps][kCols]
  const int64_t tiles = (params.cols + kCols - 1) / kCols;
  const int64_t first_col = blockIdx.x % tiles * kCols, row = blockIdx.x / tiles;
  const int64_t first = params.is_shared ? 0 : row, last = params.is_shared ? params.sequences : row + 1;
  const int64_t col = first_col + threadIdx.x % (kVector == 1 ? kWarp : kSqnormLanes) * kVector;
  const bool is_column = col < params.cols;
  // The threads that add the warps' sums have a column each.
  const bool adds = threadIdx.x < kCols && first_col + threadIdx.x < params.cols;
  float* const target = params.sqnorm + row * params.cols + first_col + threadIdx.x;
  float sqnorm = adds ? *target : 0.0f;
  for (int64_t sequence = first; sequence < last; ++sequence) {
    const Bits* x = static_cast<const Bits*>(params.x) + sequence * params.sequence_stride + col;
    int64_t tokens = params.tokens;
    if (params.ends != nullptr) {
      const int64_t before = sequence == 0 ? 0 : params.ends[sequence - 1];
      const int64_t begin = min(max(before, int64_t{0}), tokens);
      x += begin * params.token_stride;
      tokens = max(min(static_cast<int64_t>(params.ends[sequence]), tokens) - begin, int64_t{0});
      if (tokens == 0) return;
    }
    const bool* const mask =
        params.token_mask == nullptr ? nullptr : params.token_mask + sequence * params.tokens;
    const auto counts = [&](int64_t token) { return mask == nullptr || mask[token]; };
    double total = 0;
    for (int64_t begin = 0; begin < tokens; begin += kSqnormChunk) {
      const int64_t end = min(begin + kSqnormChunk, tokens);
      sum_of_warp<kDtype, kVector>(x, params.token_stride, begin, end, is_column, counts,
                                   sums[threadIdx.x / kWarp]);
      __syncthreads();
      if (adds) {
        float part[kSqnormWarps];
#pragma unroll
        for (int w = 0; w < kSqnormWarps; ++w) part[w] = sums[w][threadIdx.x];
        total += static_cast<double>(tree_sum(part));
      }
      __syncthreads();
    }
    sqnorm = __fadd_rn(sqnorm, static_cast<float>(total));
  }
  if (adds) *target = sqnorm;
}

}  // namespace wanda::cuda
