// Column sums of squares: sqnorm[j] += sum over tokens of x[t, j]^2, for each sequence.
//
// Algorithm: a sequence is cut into chunks of 128 tokens. partial_kernel sums a chunk: warp w takes tokens w,
// w + 8, ... in order, float32 with fused multiply-add, and the eight warps' sums are added as a tree.
// total_kernel adds a sequence's chunks in order in float64, rounds once and adds to sqnorm. No atomics, and
// nothing depends on the device: the same bits on every GPU, and for any split of whole sequences into calls.
//
// Assumes: nothing; where rows are 16-byte aligned and whole chunks of 16 bytes, kVector elements a lane,
// else one.
//
// One thread: kVector neighbouring columns, 16 tokens of a chunk.
//
// Bytes an element: x in once; partial sums out and in, 1/16 byte (3 % of a bf16 x). Chunks of 128 tokens and
// tiles of 256 columns make 256 blocks of 2,048 tokens by 4,096 columns, enough for 132 processors.
#pragma once

#include "score.cuh"

namespace wanda::cuda {

template <Dtype kDtype, int kVector>
WANDA_DEVICE void add_squares(const typename Element<kDtype>::Bits* x, float (&sum)[kVector]) {
  float value[kVector];
  if constexpr (kVector == 1) {
    value[0] = to_float<kDtype>(*x);
  } else {
    const uint4 chunk = load_16(x);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if constexpr (kVector == 8) {
        unpack<kDtype>(component(chunk, i), value[2 * i], value[2 * i + 1]);
      } else {
        value[i] = __uint_as_float(component(chunk, i));
      }
    }
  }
#pragma unroll
  for (int i = 0; i < kVector; ++i) sum[i] = __fmaf_rn(value[i], value[i], sum[i]);
}

// A block: one chunk of tokens, 32 * kVector columns.
template <Dtype kDtype, int kVector>
__global__ void __launch_bounds__(kSqnormWarps* kWarp) sqnorm_partial_kernel(const SqnormParams params) {
  using Bits = typename Element<kDtype>::Bits;
  constexpr int kTile = kWarp * kVector;
  WANDA_DYNAMIC_SHARED(memory);
  // [kSqnormWarps][kVector][kWarp + 1]: lanes write without a bank conflict, columns are read in order.
  float (*const sums)[kVector][kWarp + 1] = reinterpret_cast<float (*)[kVector][kWarp + 1]>(memory);
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t tiles = (params.cols + kTile - 1) / kTile;
  const int64_t chunk = blockIdx.x / tiles;
  const int64_t first_col = blockIdx.x % tiles * kTile;
  const int64_t chunks = (params.tokens + kSqnormChunk - 1) / kSqnormChunk;
  const int64_t sequence = chunk / chunks;
  const int64_t begin = chunk % chunks * kSqnormChunk;
  const int64_t end = min(begin + kSqnormChunk, params.tokens);
  const int64_t col = first_col + lane * kVector;

  float sum[kVector] = {};
  if (col < params.cols) {
    const Bits* const x = static_cast<const Bits*>(params.x) + sequence * params.sequence_stride + col;
    const bool* const counts =
        params.token_mask == nullptr ? nullptr : params.token_mask + sequence * params.tokens;
#pragma unroll 8
    for (int64_t token = begin + warp; token < end; token += kSqnormWarps) {
      // Selected, not multiplied by 0: what a padding token holds may be NaN.
      if (counts == nullptr || counts[token]) add_squares<kDtype>(x + token * params.token_stride, sum);
    }
  }
#pragma unroll
  for (int i = 0; i < kVector; ++i) sums[warp][i][lane] = sum[i];
  __syncthreads();
  for (int i = threadIdx.x; i < kTile; i += kSqnormWarps * kWarp) {
    if (first_col + i >= params.cols) break;
    const auto sum_of = [&](int w) { return sums[w][i % kVector][i / kVector]; };
    params.workspace[chunk * params.cols + first_col + i] =
        __fadd_rn(__fadd_rn(__fadd_rn(sum_of(0), sum_of(1)), __fadd_rn(sum_of(2), sum_of(3))),
                  __fadd_rn(__fadd_rn(sum_of(4), sum_of(5)), __fadd_rn(sum_of(6), sum_of(7))));
  }
}

// One thread a column of one sequence, or of all of them where they share a row of sqnorm.
__global__ void __launch_bounds__(256) sqnorm_total_kernel(const SqnormParams params) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const int64_t col = index % params.cols, first = index / params.cols;
  if (first >= (params.is_shared ? 1 : params.sequences)) return;
  const int64_t last = params.is_shared ? params.sequences : first + 1;
  const int64_t chunks = (params.tokens + kSqnormChunk - 1) / kSqnormChunk;
  float* const target = params.sqnorm + index;
  float sqnorm = *target;
  for (int64_t sequence = first; sequence < last; ++sequence) {
    double total = 0;
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      total += static_cast<double>(params.workspace[(sequence * chunks + chunk) * params.cols + col]);
    }
    sqnorm = __fadd_rn(sqnorm, static_cast<float>(total));
  }
  *target = sqnorm;
}

}  // namespace wanda::cuda
