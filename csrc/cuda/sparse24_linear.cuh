// y = x W^T + bias for a 2:4 weight and up to 32 rows of x, on the sparse tensor cores; or for each expert's
// weight and rows (experts.cuh).
//
// Algorithm: mma.sp m16n8k32 with W as its sparse operand and 8 rows of x as the 8 columns. Values, codes and
// x of 128 columns at a time come to shared memory by asynchronous copies, a few such stages ahead of where
// they are multiplied, so that what is on its way does not depend on registers. Matrix loads deal them out:
// 16 bytes of a row of values are its part of an operand, and the eight bytes of codes of 64 columns are, two
// a lane, the metadata of both of their instructions. 16-byte parts lie where their index XOR the row says:
// no bank conflicts.
//
// Few rows leave processors without a block. The columns are then cut into `slices`, and row r of W counts as
// `slices` rows, one for each slice, as does a row of x: an instruction multiplies slices with each other
// that do not belong together, but has nothing else to do for one row of x, and the sums of the others are
// the product. Nothing goes through device memory, and no second kernel is launched.
//
// Warps share out the columns. Slices and warps are added in order: the same bits in every run. How many
// there are, and so the order, depends on the tokens of a launch and on the device's processors (plan.h).
//
// Assumes: cols a multiple of 64 * slices; values, codes and x 16-byte aligned; tokens * slices <=
// kMostColumns; slices = 1 beyond 8; 16-bit types.
//
// A block: 16 * kRowTiles / slices rows. A warp: every blockDim.x / 32-th stretch of 128 columns of a slice.
//
// Bytes: values and codes once, 1.125 an element; x from L2, as often as there are blocks.
//
// Sources: PTX ISA, "Matrix fragments for sparse mma.m16n8k32 with .f16 and .bf16 types".
#pragma once

#include "block.cuh"
#include "experts.cuh"
#include "score.cuh"

namespace wanda::cuda {

// Copies of stretches into stages, and what becomes of them. Rows and columns (of the product: rows of x) are
// slices from here on. What a lane adds to a stage's address is worked out once and kept.
template <Dtype kDtype, int kRowTiles, int kMostColumns>
struct Sparse24Product {
  static constexpr int kRows = 16 * kRowTiles, kValueBytes = kRows * kSparse24Cols;
  static constexpr int kCodeBytes = kRows * kSparse24Cols / 8, kXBytes = kSparse24Cols * 2;
  static constexpr int kTokenTiles = (kMostColumns + 7) / 8, kStages = sparse24_stages(kMostColumns);
  static constexpr bool kIsBFloat16 = kDtype == Dtype::kBFloat16;

  uint32_t cols;
  int32_t columns;
  const char *values, *codes, *x;  // of this lane's first part of the stretch that is copied next
  uint32_t value_row[4 * kRowTiles], code_row[kRowTiles];  // in 16 and 8 bytes from there
  uint32_t value_to[2], code_to, x_to;  // for rows 4i + lane / 8, i even and odd; 16 rows; a row of x
  uint32_t value_at[4], code_at, x_at[kTokenTiles][2];  // for each four chunks of a row of values, eight of x
  float sums[kRowTiles][kTokenTiles][4] = {};

  WANDA_DEVICE Sparse24Product(const PackedLinearParams& params, int64_t block, int slices, uint32_t column)
      : cols(static_cast<uint32_t>(params.weight.cols / slices)),
        columns(static_cast<int32_t>(params.tokens) * slices) {
    const int lane = lane_of(threadIdx.x), quad = lane / 4, matrix = lane / 8, row = lane % 8;
    const int64_t first = block * kRows;
    const int64_t last = params.weight.rows * slices - 1 - first;  // rows past the last: the last again
    values = static_cast<const char*>(params.weight.values) + first * cols + lane % 8 * 16 + column;
    codes =
        reinterpret_cast<const char*>(params.weight.codes) + first * (cols / 8) + lane % 2 * 8 + column / 8;
    x = static_cast<const char*>(params.x) + lane / 16 * int64_t{cols} * 2 + lane % 16 * 16 + column * 2;
#pragma unroll
    for (int i = 0; i < 4 * kRowTiles; ++i) {
      value_row[i] = opaque(static_cast<uint32_t>(min(int64_t{4 * i + lane / 8}, last)) * (cols / 16));
    }
#pragma unroll
    for (int t = 0; t < kRowTiles; ++t) {
      code_row[t] = opaque(static_cast<uint32_t>(min(int64_t{16 * t + lane / 2}, last)) * (cols / 64));
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      value_to[i] = opaque(lane / 8 * kSparse24Cols + ((lane % 8) ^ (4 * i + lane / 8)) * 16);
    }
    code_to = opaque(kValueBytes + lane * 8);
    x_to = opaque(lane / 16 * kXBytes + ((lane % 16) ^ (lane / 16)) * 16);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      value_at[i] = opaque((matrix % 2 * 8 + row) * kSparse24Cols + ((2 * i + matrix / 2) ^ row) * 16);
    }
    code_at = opaque(kValueBytes + quad * 16 + lane % 4 * 2);
#pragma unroll
    for (int n = 0; n < kTokenTiles; ++n) {
      const int c = min(8 * n + row, columns - 1);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        x_at[n][half] = opaque(kValueBytes + kCodeBytes + c * kXBytes + ((4 * half + matrix) ^ (c % 8)) * 16);
      }
    }
  }

  // As sparse24_stage_bytes.
  WANDA_DEVICE uint32_t stage_bytes() const { return kValueBytes + kCodeBytes + columns * kXBytes; }

  // Copies the stretch, of which `left` columns are there, to a stage, and goes on to that `step` columns
  // further.
  WANDA_DEVICE void copy(int32_t left, SharedAddress stage, uint32_t step) {
    const int32_t lane = lane_of(threadIdx.x);
    if (lane % 8 * 16 < left) {
#pragma unroll
      for (int i = 0; i < 4 * kRowTiles; ++i) {
        copy_async_16(stage + value_to[i % 2] + i * 4 * kSparse24Cols, values + uint64_t{value_row[i]} * 16);
      }
    }
    if (lane % 2 * 64 < left) {
#pragma unroll
      for (int t = 0; t < kRowTiles; ++t) {
        copy_async_8(stage + code_to + t * 256, codes + uint64_t{code_row[t]} * 8);
      }
    }
#pragma unroll
    for (int i = 0; i < kMostColumns / 2; ++i) {
      if (lane % 16 * 8 < left && 2 * i + lane / 16 < columns) {
        copy_async_16(stage + kValueBytes + kCodeBytes + (x_to ^ i % 4 * 32) + i * 2 * kXBytes,
                      x + uint64_t{cols} * (4 * i));
      }
    }
    values += step;
    codes += step / 8;
    x += step * 2;
  }

  WANDA_DEVICE void multiply(int32_t left, SharedAddress stage) {
#pragma unroll
    for (int stretch = 0; stretch < 2; ++stretch) {
      if (stretch == 1 && left <= 64) break;
      uint32_t metadata[kRowTiles];
#pragma unroll
      for (int t = 0; t < kRowTiles; ++t) {  // of rows `quad` and `quad` + 8
        const SharedAddress at = stage + code_at + t * 256 + stretch * 8;
        metadata[t] = permute_bytes(load_shared<uint16_t>(at), load_shared<uint16_t>(at + 128), 0x5410);
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        uint32_t part[kTokenTiles][4];
#pragma unroll
        for (int n = 0; n < kTokenTiles; ++n) {
          load_matrices(stage + x_at[n][half] + stretch * 128, part[n]);
        }
#pragma unroll
        for (int t = 0; t < kRowTiles; ++t) {
          uint32_t kept[4];
          load_matrices(stage + value_at[2 * stretch + half] + t * 16 * kSparse24Cols, kept);
#pragma unroll
          for (int n = 0; n < kTokenTiles; ++n) {
            if (half == 0) {
              mma_sparse<kIsBFloat16, 0>(sums[t][n], kept, part[n], metadata[t]);
            } else {
              mma_sparse<kIsBFloat16, 1>(sums[t][n], kept, part[n], metadata[t]);
            }
          }
        }
      }
    }
  }

  // [8 * kTokenTiles][kRows]
  WANDA_DEVICE void store(float* to) const {
    const int quad = lane_of(threadIdx.x) / 4, q = lane_of(threadIdx.x) % 4;
#pragma unroll
    for (int t = 0; t < kRowTiles; ++t) {
#pragma unroll
      for (int n = 0; n < kTokenTiles; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          to[(8 * n + 2 * q + i % 2) * kRows + 16 * t + 8 * (i / 2) + quad] = sums[t][n][i];
        }
      }
    }
  }
};

template <Dtype kDtype, int kRowTiles, int kMostColumns>
WANDA_DEVICE void sparse24_linear_block(const PackedLinearParams& params, int64_t block, int slices,
                                        unsigned char* memory, int stages) {
  using Product = Sparse24Product<kDtype, kRowTiles, kMostColumns>;
  constexpr int kRows = Product::kRows, kAhead = Product::kStages - 1;
  const PackedWeight& weight = params.weight;
  const int warps = static_cast<int>(blockDim.x) / kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
  const uint32_t step = opaque(warps * kSparse24Cols), column = warp * kSparse24Cols;
  Product product(params, block, slices, column);
  const uint32_t stage_bytes = opaque(product.stage_bytes()), warp_bytes = stages * stage_bytes;
  unsigned char* const own = memory + warp * warp_bytes;
  const SharedAddress begin = shared_address(own), end = begin + warp_bytes;

  SharedAddress to = begin, stage = begin;
  int32_t left = static_cast<int32_t>(product.cols - column), left_to_copy = left;
  const auto copy_next = [&] {
    product.copy(left_to_copy, to, step);
    copy_async_commit();
    left_to_copy -= static_cast<int32_t>(step);
    to = to + stage_bytes == end ? begin : to + stage_bytes;
  };
#pragma unroll 1
  for (int i = 0; i < kAhead; ++i) copy_next();
#pragma unroll 1
  for (; left > 0; left -= static_cast<int32_t>(step)) {
    __syncwarp();  // nobody reads the stage before any more, which is copied to next
    copy_next();
    copy_async_wait<kAhead>();
    __syncwarp();  // all lanes' copies are there
    product.multiply(left, stage);
    stage = stage + stage_bytes == end ? begin : stage + stage_bytes;
  }
  __syncwarp();  // the sums take the first stage's place
  product.store(reinterpret_cast<float*>(own));
  __syncthreads();

  const uint16_t* const bias = static_cast<const uint16_t*>(params.bias);
  const int rows = kRows / slices;
  const int64_t first_row = block * rows;
  for (int i = static_cast<int>(threadIdx.x); i < rows * params.tokens; i += static_cast<int>(blockDim.x)) {
    const int r = i % rows, token = i / rows;
    if (first_row + r >= weight.rows) continue;
    float total = 0;
    for (int slice = 0; slice < slices; ++slice) {
      const int at = (token * slices + slice) * kRows + r * slices + slice;
      for (int w = 0; w < warps; ++w) {
        total = __fadd_rn(total, reinterpret_cast<const float*>(memory + w * warp_bytes)[at]);
      }
    }
    if (bias != nullptr) total = __fadd_rn(total, to_float<kDtype>(bias[first_row + r]));
    static_cast<uint16_t*>(params.y)[token * weight.rows + first_row + r] = from_float<kDtype>(total);
  }
}

template <Dtype kDtype, int kRowTiles, int kMostColumns>
__global__ void __launch_bounds__(kSparse24Warps* kWarp)
    sparse24_linear_kernel(const PackedLinearParams params, const int slices, const int stages) {
  WANDA_DYNAMIC_SHARED(memory);
  sparse24_linear_block<kDtype, kRowTiles, kMostColumns>(params, blockIdx.x, slices, memory, stages);
}

// `blocks`: of an expert.
template <Dtype kDtype, int kMostColumns>
__global__ void __launch_bounds__(kSparse24Warps* kWarp)
    sparse24_experts_kernel(const PackedExpertsParams params, const uint32_t blocks, const int stages) {
  WANDA_DYNAMIC_SHARED(memory);
  each_turn<kDtype>(params, blocks, kMostColumns, [&](const PackedLinearParams& own, uint32_t block) {
    sparse24_linear_block<kDtype, 1, kMostColumns>(own, block, 1, memory, stages);
  });
}

}  // namespace wanda::cuda
