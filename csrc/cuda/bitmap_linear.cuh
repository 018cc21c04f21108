// y = x W^T + bias for a W packed as a bitmap and up to 8 rows of x.
//
// Algorithm, 16-bit types: bitmap.cuh walks the rows, four elements a lane. Two byte permutations, chosen by
// the four bits, put them where they belong, and the tensor cores multiply: a lane's four elements are its
// part of an operand of 16 x 8, column g of which are 16 columns of W, and row g of the other operand has the
// same 16 columns of x. Only the diagonal of the product means anything: element (g, g), and (g + 8, g) for a
// second row of x. The tensor cores have nothing else to do, and an element costs no conversion and no
// multiplication: 7 SASS instructions at one row of x, 12 at eight (sm_90), where 10 are what an H100's
// memory leaves. With multiplications in float32 it took 10 at one row of x. float32: each lane multiplies
// its own. Lanes are added by a butterfly, warps in order: the same bits in every run.
//
// Assumes: cols a multiple of 64; x 16-byte aligned; 1 <= tokens <= kBatch.
//
// A block: four rows, which share the loads of x, all of their columns. A warp: pieces of 1024 columns.
//
// Bytes: values and bitmap once, 1.125 an element in 16-bit types at 50 %; x from L1 and L2.
#pragma once

#include "bitmap.cuh"

namespace wanda::cuda {

template <int kBatch>
struct BitmapLinearShared {
  BitmapShared<kBitmapLinearRows> walk;
  float sums[kBitmapWarps][kBitmapLinearRows * kBatch];
};

// How the rows of a block are multiplied: add() takes what walk_bitmap visits, sums() gives each lane's part
// of [kBitmapLinearRows][kBatch] sums.
template <Dtype kDtype, int kBatch>
struct BitmapProduct {
  static constexpr int kRows = kBitmapLinearRows, kPairs = (kBatch + 1) / 2;
  static constexpr bool kIsBFloat16 = kDtype == Dtype::kBFloat16;

  const uint16_t* values;
  const uint16_t* x;
  uint32_t token[kBatch];  // where it begins in x
  uint32_t cols;
  uint32_t
      table;  // the selectors of lane % 16 as four bits: of the first two elements, and above of the others
  float diagonal[kRows][kPairs][4] = {};

  // Bytes 0 and 1 are the next value, 4 and 5 the one after it, 2 is zero.
  WANDA_DEVICE static uint32_t selector(uint32_t two_bits) {
    return two_bits == 3 ? 0x5410 : two_bits == 2 ? 0x1022 : two_bits == 1 ? 0x2210 : 0x2222;
  }

  WANDA_DEVICE BitmapProduct(const PackedLinearParams& params)
      : values(static_cast<const uint16_t*>(params.weight.values)),
        x(static_cast<const uint16_t*>(params.x)),
        cols(static_cast<uint32_t>(params.weight.cols)) {
    const int tokens = static_cast<int>(params.tokens), lane = lane_of(threadIdx.x);
#pragma unroll
    for (int b = 0; b < kBatch; ++b) token[b] = opaque(min(b, tokens - 1) * cols);
    table = opaque(selector(lane & 3) | selector(lane >> 2 & 3) << 16);
  }

  WANDA_DEVICE void add(uint32_t column, const Quad (&quads)[kRows]) {
    uint2 four[2 * kPairs];
#pragma unroll
    for (int b = 0; b < 2 * kPairs; ++b) {
      four[b] = make_uint2(0, 0);
      if (b < kBatch && column < cols) {
        four[b] = *reinterpret_cast<const uint2*>(x + (token[b < kBatch ? b : 0] + column));
      }
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const uint32_t selectors = __shfl_sync(kFullMask, table, quads[r].bits);
      const uint16_t* const first = values + quads[r].index;
      const uint16_t* const second = values + (quads[r].index + __popc(quads[r].bits & 3));
      const uint32_t low = permute_bytes(__ldg(first), __ldg(first + 1), selectors);
      const uint32_t high = permute_bytes(__ldg(second), __ldg(second + 1), selectors >> 16);
#pragma unroll
      for (int p = 0; p < kPairs; ++p) {
        mma<kIsBFloat16>(diagonal[r][p], {four[2 * p].x, four[2 * p + 1].x, four[2 * p].y, four[2 * p + 1].y},
                         {low, high});
      }
    }
  }

  WANDA_DEVICE void sums(float (&sum)[kRows * kBatch]) const {
    const int g = lane_of(threadIdx.x) / 4, q = lane_of(threadIdx.x) % 4;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        const float* const two = diagonal[r][b / 2] + b % 2 * 2;  // columns 2q and 2q + 1 of row g or g + 8
        sum[r * kBatch + b] = q != g / 2 ? 0.0f : g % 2 == 0 ? two[0] : two[1];
      }
    }
  }
};

template <int kBatch>
struct BitmapProduct<Dtype::kFloat32, kBatch> {
  static constexpr int kRows = kBitmapLinearRows;

  const uint32_t* values;
  const float* token[kBatch];
  uint32_t cols;
  float total[kRows][kBatch] = {};

  WANDA_DEVICE BitmapProduct(const PackedLinearParams& params)
      : values(static_cast<const uint32_t*>(params.weight.values)),
        cols(static_cast<uint32_t>(params.weight.cols)) {
    const int tokens = static_cast<int>(params.tokens);
    for (int b = 0; b < kBatch; ++b) {
      token[b] = static_cast<const float*>(params.x) + min(b, tokens - 1) * params.weight.cols;
    }
  }

  WANDA_DEVICE void add(uint32_t column, const Quad (&quads)[kRows]) {
    if (column >= cols) return;
    uint32_t element[kRows][4];
#pragma unroll
    for (int r = 0; r < kRows; ++r) quad_values(values, quads[r], element[r]);
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      const float4 four = __ldg(reinterpret_cast<const float4*>(token[b] + column));
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          total[r][b] = __fmaf_rn(__uint_as_float(element[r][i]), component(four, i), total[r][b]);
        }
      }
    }
  }

  WANDA_DEVICE void sums(float (&sum)[kRows * kBatch]) const {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
      for (int b = 0; b < kBatch; ++b) sum[r * kBatch + b] = total[r][b];
    }
  }
};

template <Dtype kDtype, int kBatch>
__global__ void __launch_bounds__(kBitmapWarps* kWarp) bitmap_linear_kernel(const PackedLinearParams params) {
  using Bits = typename Element<kDtype>::Bits;
  constexpr int kRows = kBitmapLinearRows, kSums = kRows * kBatch;
  WANDA_DYNAMIC_SHARED(memory);
  BitmapLinearShared<kBatch>& shared = *reinterpret_cast<BitmapLinearShared<kBatch>*>(memory);
  const PackedWeight& weight = params.weight;
  const int64_t first_row = static_cast<int64_t>(blockIdx.x) * kRows;
  BitmapProduct<kDtype, kBatch> product(params);
  walk_bitmap<kRows>(weight, first_row, shared.walk,
                     [&](uint32_t column, const Quad(&quads)[kRows]) { product.add(column, quads); });
  float sum[kSums];
  product.sums(sum);
  const float own = warp_sums(sum);
  const int thread = static_cast<int>(threadIdx.x);
  if (lane_of(thread) < kSums) shared.sums[thread / kWarp][lane_of(thread)] = own;
  __syncthreads();
  const int r = thread / kBatch, b = thread % kBatch;
  if (r >= kRows || b >= static_cast<int>(params.tokens) || first_row + r >= weight.rows) return;
  float total = 0;
  for (int w = 0; w < static_cast<int>(blockDim.x) / kWarp; ++w)
    total = __fadd_rn(total, shared.sums[w][thread]);
  const Bits* const bias = static_cast<const Bits*>(params.bias);
  if (bias != nullptr) total = __fadd_rn(total, to_float<kDtype>(bias[first_row + r]));
  static_cast<Bits*>(params.y)[b * weight.rows + first_row + r] = from_float<kDtype>(total);
}

}  // namespace wanda::cuda
