// y = x W^T + bias for a 2:4 weight and up to 32 rows of x, on the sparse tensor cores.
//
// Algorithm: mma.sp m16n8k32 with W as its sparse operand and 8 rows of x as the 8 columns. Which 32 columns
// of W an instruction takes, and in what order, is free as long as x has the same: lane q of a quad loads the
// 16 bytes of values behind columns 16q to 16q + 15 of 64, four groups of four, and two instructions take two
// groups of each lane. The metadata of both are then nibbles q, q + 4, q + 8, q + 12 of the row's 16: what
// lane q of a quad gives (lanes 0 and 1 to the first instruction, 2 and 3 to the second). No shared memory,
// no exchange between lanes. Warps share out the columns (split-K inside a block) and are added in order: the
// same bits in every run.
//
// Assumes: cols a multiple of 64; values, codes and x 16-byte aligned; tokens <= 8 * kTokenTiles; 16-bit
// types.
//
// A block: 16 * kRowTiles rows, all of their columns. A warp: every blockDim.x / 32-th stretch of 64 columns.
//
// Bytes: values and codes once, 1.125 an element; x from L1 and L2, as often as there are blocks.
//
// Sources: PTX ISA, "Matrix fragments for sparse mma.m16n8k32 with .f16 and .bf16 types".
#pragma once

#include "block.cuh"
#include "score.cuh"

namespace wanda::cuda {

constexpr int sparse24_shared_bytes(int row_tiles, int token_tiles, int warps) {
  return warps * row_tiles * 16 * token_tiles * 8 * static_cast<int>(sizeof(float));
}

// Nibbles q, q + 4, q + 8 and q + 12 of the 16 in `codes`, in the low half of the result.
WANDA_DEVICE uint32_t every_fourth_nibble(const uint2& codes, int q) {
  const uint32_t two = 0x000f000fu;
  const uint32_t four = (codes.x >> 4 * q & two) | (codes.y >> 4 * q & two) << 8;
  return four | four >> 12;
}

template <Dtype kDtype, int kRowTiles, int kTokenTiles>
__global__ void __launch_bounds__(kSparse24Warps* kWarp)
    sparse24_linear_kernel(const PackedLinearParams params) {
  WANDA_DYNAMIC_SHARED(memory);
  float* const partial = reinterpret_cast<float*>(memory);  // [warps][tokens][rows]
  constexpr int kRows = 16 * kRowTiles, kTokens = 8 * kTokenTiles;
  constexpr bool kIsBFloat16 = kDtype == Dtype::kBFloat16;
  const PackedWeight& weight = params.weight;
  const int warps = static_cast<int>(blockDim.x) / kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
  const int quad = lane_of(threadIdx.x) / 4, q = lane_of(threadIdx.x) % 4;
  const int64_t first_row = static_cast<int64_t>(blockIdx.x) * kRows;

  const uint16_t* values[kRowTiles]
                        [2];  // of rows `quad` and `quad` + 8 of a tile; past the last row: the last again
  const uint8_t* codes[kRowTiles][2];
#pragma unroll
  for (int t = 0; t < kRowTiles; ++t) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t row = min(first_row + 16 * t + 8 * half + quad, weight.rows - 1);
      values[t][half] = static_cast<const uint16_t*>(weight.values) + row * (weight.cols / 2) + 8 * q;
      codes[t][half] = weight.codes + row * (weight.cols / 8);
    }
  }
  const uint16_t* x[kTokenTiles];
#pragma unroll
  for (int n = 0; n < kTokenTiles; ++n) {
    const int64_t token = min(static_cast<int64_t>(8 * n + quad), params.tokens - 1);
    x[n] = static_cast<const uint16_t*>(params.x) + token * weight.cols + 16 * (q / 2) + 2 * (q % 2);
  }

  float sums[kRowTiles][kTokenTiles][4] = {};
  const int64_t stretches = weight.cols / 64;
#pragma unroll 2
  for (int64_t stretch = warp; stretch < stretches; stretch += warps) {
    uint4 chunk[kRowTiles][2];
    uint32_t metadata[kRowTiles];
#pragma unroll
    for (int t = 0; t < kRowTiles; ++t) {
      uint32_t nibbles[2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        chunk[t][half] = load_16(values[t][half] + stretch * 32);
        nibbles[half] = every_fourth_nibble(*reinterpret_cast<const uint2*>(codes[t][half] + stretch * 8), q);
      }
      metadata[t] = permute_bytes(nibbles[0], nibbles[1], 0x5410);
    }
#pragma unroll
    for (int n = 0; n < kTokenTiles; ++n) {
      // Groups of four columns: 0 and 1 of each 16 for the first instruction, 2 and 3 for the second.
      uint32_t groups[4][2];
#pragma unroll
      for (int group = 0; group < 4; ++group) {
#pragma unroll
        for (int far = 0; far < 2; ++far) {
          groups[group][far] =
              __ldg(reinterpret_cast<const uint32_t*>(x[n] + stretch * 64 + 32 * far + 4 * group));
        }
      }
#pragma unroll
      for (int t = 0; t < kRowTiles; ++t) {
        mma_sparse<kIsBFloat16, 0>(sums[t][n], {chunk[t][0].x, chunk[t][1].x, chunk[t][0].y, chunk[t][1].y},
                                   {groups[0][0], groups[0][1], groups[1][0], groups[1][1]}, metadata[t]);
        mma_sparse<kIsBFloat16, 1>(sums[t][n], {chunk[t][0].z, chunk[t][1].z, chunk[t][0].w, chunk[t][1].w},
                                   {groups[2][0], groups[2][1], groups[3][0], groups[3][1]}, metadata[t]);
      }
    }
  }
#pragma unroll
  for (int t = 0; t < kRowTiles; ++t) {
#pragma unroll
    for (int n = 0; n < kTokenTiles; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int row = 16 * t + 8 * (i / 2) + quad, token = 8 * n + 2 * q + i % 2;
        partial[(warp * kTokens + token) * kRows + row] = sums[t][n][i];
      }
    }
  }
  __syncthreads();
  const uint16_t* const bias = static_cast<const uint16_t*>(params.bias);
  for (int i = static_cast<int>(threadIdx.x); i < kRows * kTokens; i += static_cast<int>(blockDim.x)) {
    const int64_t row = first_row + i % kRows, token = i / kRows;
    if (row >= weight.rows || token >= params.tokens) continue;
    float total = 0;
    for (int w = 0; w < warps; ++w) total = __fadd_rn(total, partial[w * kTokens * kRows + i]);
    if (bias != nullptr) total = __fadd_rn(total, to_float<kDtype>(bias[row]));
    static_cast<uint16_t*>(params.y)[token * weight.rows + row] = from_float<kDtype>(total);
  }
}

}  // namespace wanda::cuda
