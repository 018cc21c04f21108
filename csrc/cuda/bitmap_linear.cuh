// y = x W^T + bias for a W packed as a bitmap and up to 8 rows of x; or for each expert's W and rows
// (experts.cuh).
//
// Algorithm, 16-bit types: bitmap.cuh walks the rows, four elements a lane. Two byte permutations, chosen by
// the four bits, put them where they belong, and the tensor cores multiply: a lane's four elements of two
// rows of W are its part of an operand of 16 x 16, rows g and g + 8 of which are columns 16g to 16g + 15 of
// W's rows, and column g of the other operand has the same 16 columns of x. Only elements (g, g) and
// (g + 8, g) of the product mean anything: the tensor cores have nothing else to do, and an element costs no
// conversion and no multiplication: 7 SASS instructions at one row of x, 9 at eight (sm_90), finding its
// value and copying it included, where 10 are what an H100's memory leaves. float32: each lane multiplies its
// own. Lanes are added by a butterfly, warps in order: the same bits in every run.
//
// Assumes: as bitmap.cuh; cols a multiple of 64; x 16-byte aligned; 1 <= tokens <= kBatch.
//
// A block: kRows rows, which share the loads of x, all of their columns: four, or two where that leaves
// processors without a block. A warp: a share of the columns.
//
// Bytes: values and bitmap once, 1.125 an element in 16-bit types at 50 %; x from L1 and L2.
#pragma once

#include "bitmap.cuh"
#include "experts.cuh"

namespace wanda::cuda {

// How the rows of a block are multiplied: add() takes what walk_bitmap visits, sums() gives each lane's part
// of [kRows][kBatch] sums.
template <Dtype kDtype, int kRows, int kBatch>
struct BitmapProduct {
  static constexpr bool kIsBFloat16 = kDtype == Dtype::kBFloat16;

  const uint16_t* x;
  uint32_t token[kBatch];  // where it begins in x
  uint32_t cols;
  uint32_t
      table;  // the selectors of lane % 16 as four bits: of the first two elements, and above of the others
  float diagonal[kRows / 2][kBatch][4] = {};

  // Bytes 0 and 1 are the next value, 4 and 5 the one after it, 2 is zero.
  WANDA_DEVICE static uint32_t selector(uint32_t two_bits) {
    return two_bits == 3 ? 0x5410 : two_bits == 2 ? 0x1022 : two_bits == 1 ? 0x2210 : 0x2222;
  }

  WANDA_DEVICE BitmapProduct(const PackedLinearParams& params)
      : x(static_cast<const uint16_t*>(params.x)), cols(static_cast<uint32_t>(params.weight.cols)) {
    const int tokens = static_cast<int>(params.tokens), lane = lane_of(threadIdx.x);
#pragma unroll
    for (int b = 0; b < kBatch; ++b) token[b] = opaque(min(b, tokens - 1) * cols);
    table = opaque(selector(lane & 3) | selector(lane >> 2 & 3) << 16);
  }

  WANDA_DEVICE void add(uint32_t column, uint32_t offset, const Quad (&quads)[kRows]) {
    const int32_t left = static_cast<int32_t>(cols - column);
    uint2 four[kBatch];
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      four[b] = make_uint2(0, 0);
      if (static_cast<int32_t>(offset) < left) {
        four[b] = *reinterpret_cast<const uint2*>(x + (token[b] + column) + offset);
      }
    }
#pragma unroll
    for (int pair = 0; pair < kRows / 2; ++pair) {
      uint32_t operand[4];
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const Quad& quad = quads[2 * pair + r];
        const uint32_t selectors = __shfl_sync(kFullMask, table, quad.bits);
        const SharedAddress first = quad.values;
        const SharedAddress second = first + (quad.bits & 3) + (quad.bits & 1);  // 2 bytes for each bit
        operand[r] = permute_bytes(load_shared<uint16_t>(first), load_shared<uint16_t>(first + 2), selectors);
        operand[2 + r] =
            permute_bytes(load_shared<uint16_t>(second), load_shared<uint16_t>(second + 2), selectors >> 16);
      }
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        mma<kIsBFloat16>(diagonal[pair][b], operand, {four[b].x, four[b].y});
      }
    }
  }

  WANDA_DEVICE void sums(float (&sum)[kRows * kBatch]) const {
    const int g = lane_of(threadIdx.x) / 4, q = lane_of(threadIdx.x) % 4;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        const float* const two = diagonal[r / 2][b] + r % 2 * 2;  // columns 2q and 2q + 1 of row g or g + 8
        sum[r * kBatch + b] = q != g / 2 ? 0.0f : g % 2 == 0 ? two[0] : two[1];
      }
    }
  }
};

template <int kRows, int kBatch>
struct BitmapProduct<Dtype::kFloat32, kRows, kBatch> {
  const float* token[kBatch];
  uint32_t cols;
  float total[kRows][kBatch] = {};

  WANDA_DEVICE BitmapProduct(const PackedLinearParams& params)
      : cols(static_cast<uint32_t>(params.weight.cols)) {
    const int tokens = static_cast<int>(params.tokens);
    for (int b = 0; b < kBatch; ++b) {
      token[b] = static_cast<const float*>(params.x) + min(b, tokens - 1) * params.weight.cols;
    }
  }

  WANDA_DEVICE void add(uint32_t column, uint32_t offset, const Quad (&quads)[kRows]) {
    if (column + offset >= cols) return;
    uint32_t element[kRows][4];
#pragma unroll
    for (int r = 0; r < kRows; ++r) quad_values(quads[r], element[r]);
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      const float4 four = __ldg(reinterpret_cast<const float4*>(token[b] + column + offset));
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

template <Dtype kDtype, int kRows, int kBatch>
WANDA_DEVICE void bitmap_linear_block(const PackedLinearParams& params, int64_t block, unsigned char* memory,
                                      int stages) {
  using Bits = typename Element<kDtype>::Bits;
  constexpr int kSums = kRows * kBatch;
  const PackedWeight& weight = params.weight;
  const int64_t first_row = block * kRows;
  BitmapProduct<kDtype, kRows, kBatch> product(params);
  walk_bitmap<kDtype, kRows>(weight, first_row, memory, stages,
                             [&](uint32_t column, uint32_t offset, const Quad(&quads)[kRows]) {
                               product.add(column, offset, quads);
                             });
  float sum[kSums];
  product.sums(sum);
  const float own = warp_sums(sum);
  const int thread = static_cast<int>(threadIdx.x);
  const int warps = static_cast<int>(blockDim.x) / kWarp;
  float* const sums =
      reinterpret_cast<float*>(memory + warps * stages * BitmapWalk<kDtype, kRows>::kStageBytes);
  if (lane_of(thread) < kSums) sums[thread / kWarp * kSums + lane_of(thread)] = own;
  __syncthreads();
  const int r = thread / kBatch, b = thread % kBatch;
  if (r >= kRows || b >= static_cast<int>(params.tokens) || first_row + r >= weight.rows) return;
  float total = 0;
  for (int w = 0; w < warps; ++w) total = __fadd_rn(total, sums[w * kSums + thread]);
  const Bits* const bias = static_cast<const Bits*>(params.bias);
  if (bias != nullptr) total = __fadd_rn(total, to_float<kDtype>(bias[first_row + r]));
  static_cast<Bits*>(params.y)[b * weight.rows + first_row + r] = from_float<kDtype>(total);
}

template <Dtype kDtype, int kRows, int kBatch>
__global__ void __launch_bounds__(kBitmapWarps* kWarp)
    bitmap_linear_kernel(const PackedLinearParams params, const int stages) {
  WANDA_DYNAMIC_SHARED(memory);
  bitmap_linear_block<kDtype, kRows, kBatch>(params, blockIdx.x, memory, stages);
}

// `blocks`: of an expert.
template <Dtype kDtype, int kRows, int kBatch>
__global__ void __launch_bounds__(kBitmapWarps* kWarp)
    bitmap_experts_kernel(const PackedExpertsParams params, const uint32_t blocks, const int stages) {
  WANDA_DYNAMIC_SHARED(memory);
  each_turn<kDtype>(params, blocks, kBatch, [&](const PackedLinearParams& own, uint32_t block) {
    bitmap_linear_block<kDtype, kRows, kBatch>(own, block, memory, stages);
  });
}

}  // namespace wanda::cuda
