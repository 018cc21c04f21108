// y = x W^T + bias for a W packed as a bitmap and up to 8 rows of x.
//
// Algorithm: bitmap.cuh walks the rows, two elements a lane; each is multiplied with x in float32 (an element
// that is not kept as a zero, as in the dense product: 0 * inf is NaN there too). Lanes are added by a
// butterfly, warps in order: the same bits in every run.
//
// Assumes: cols a multiple of 64; x 16-byte aligned; 1 <= tokens <= kBatch.
//
// A block: two rows, which share the loads of x, all of their columns. A warp: pieces of 1024 columns.
//
// Bytes: values and bitmap once, 1.125 an element in 16-bit types at 50 %; x from L1 and L2.
#pragma once

#include "bitmap.cuh"

namespace wanda::cuda {

constexpr int kBitmapLinearRows = 2;

template <int kBatch>
struct BitmapLinearShared {
  BitmapShared<kBitmapLinearRows> walk;
  float sums[kBitmapWarps][kBitmapLinearRows * kBatch];
};

// Two neighbouring elements as float32; `from` is aligned to both.
template <Dtype kDtype>
WANDA_DEVICE void load_pair(const typename Element<kDtype>::Bits* from, float& low, float& high) {
  if constexpr (kDtype == Dtype::kFloat32) {
    const uint2 pair = *reinterpret_cast<const uint2*>(from);
    low = __uint_as_float(pair.x);
    high = __uint_as_float(pair.y);
  } else {
    unpack<kDtype>(__ldg(reinterpret_cast<const uint32_t*>(from)), low, high);
  }
}

template <Dtype kDtype, int kBatch>
__global__ void __launch_bounds__(kBitmapWarps* kWarp) bitmap_linear_kernel(const PackedLinearParams params) {
  using Bits = typename Element<kDtype>::Bits;
  constexpr int kRows = kBitmapLinearRows;
  WANDA_DYNAMIC_SHARED(memory);
  BitmapLinearShared<kBatch>& shared = *reinterpret_cast<BitmapLinearShared<kBatch>*>(memory);
  const PackedWeight& weight = params.weight;
  const Bits* const values = static_cast<const Bits*>(weight.values);
  const Bits* const x = static_cast<const Bits*>(params.x);
  const int64_t first_row = static_cast<int64_t>(blockIdx.x) * kRows;
  const int tokens = static_cast<int>(params.tokens);
  float sums[kRows][kBatch] = {};
  walk_bitmap<kRows>(weight, first_row, shared.walk, [&](uint32_t column, const Pair(&pairs)[kRows]) {
    float low[kRows], high[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      Bits low_bits, high_bits;
      pair_values<kDtype>(values, pairs[r], low_bits, high_bits);
      low[r] = to_float<kDtype>(low_bits);
      high[r] = to_float<kDtype>(high_bits);
    }
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      float x_low, x_high;
      load_pair<kDtype>(x + min(b, tokens - 1) * weight.cols + column, x_low, x_high);
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        sums[r][b] = __fmaf_rn(high[r], x_high, __fmaf_rn(low[r], x_low, sums[r][b]));
      }
    }
  });
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      const float sum = warp_sum(sums[r][b]);
      if (lane_of(threadIdx.x) == 0) shared.sums[warp][r * kBatch + b] = sum;
    }
  }
  __syncthreads();
  const int r = static_cast<int>(threadIdx.x) / kBatch, b = static_cast<int>(threadIdx.x) % kBatch;
  if (r >= kRows || b >= tokens || first_row + r >= weight.rows) return;
  float total = 0;
  for (int w = 0; w < static_cast<int>(blockDim.x) / kWarp; ++w)
    total = __fadd_rn(total, shared.sums[w][threadIdx.x]);
  const Bits* const bias = static_cast<const Bits*>(params.bias);
  if (bias != nullptr) total = __fadd_rn(total, to_float<kDtype>(bias[first_row + r]));
  static_cast<Bits*>(params.y)[b * weight.rows + first_row + r] = from_float<kDtype>(total);
}

}  // namespace wanda::cuda
