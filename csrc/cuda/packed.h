// Products with packed sparse weights, and unpacking, on the GPU: parameters and launchers. The formats are
// those of wanda_kernels/packed/format.py.
#pragma once

#include <cstdint>

#include "../common/dtype.h"

struct CUstream_st;

namespace wanda::cuda {

// A weight [rows, cols], cols a multiple of 64.
struct PackedWeight {
  const void* values;     // bitmap: what is kept, row by row, and 32 more; 2:4: [rows, cols / 2]
  const uint8_t* codes;   // [rows, cols / 8]
  const int32_t* starts;  // bitmap: [rows + 1]; 2:4: nullptr
  int64_t rows, cols;
  Dtype dtype;
};

// y = x W^T + bias. `values` of 2:4, `codes` and x are 16-byte aligned.
struct PackedLinearParams {
  PackedWeight weight;
  const void* x;     // [tokens, cols]
  const void* bias;  // [rows] or nullptr
  void* y;           // [tokens, rows]
  int64_t tokens;
};

constexpr int64_t kBitmapTokens = 8;     // at most in one launch
constexpr int64_t kSparse24Tokens = 32;  // at most in one launch

// Return a cudaError_t. `launch_sparse24_linear`: 16-bit types.
int launch_bitmap_linear(const PackedLinearParams& params, CUstream_st* stream);
int launch_sparse24_linear(const PackedLinearParams& params, CUstream_st* stream);
int launch_unpack_bitmap(const PackedWeight& weight, void* dense, CUstream_st* stream);
int launch_unpack_sparse24(const PackedWeight& weight, void* dense, CUstream_st* stream);

}  // namespace wanda::cuda
