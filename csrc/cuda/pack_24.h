// 2:4 packing on CUDA: the layout of torch's SparseSemiStructuredTensorCUTLASS for 16-bit types.
// Torch-free; see pack_24.cuh.
#pragma once

#include "../common/dtype.h"

struct CUstream_st;

namespace wanda::cuda {

struct Pack24Params {
  const uint16_t*
      weight;          // [rows, cols], unit column stride, 16-byte aligned rows `row_stride` elements apart
  const float* norm;   // [cols], 16-byte aligned: select 2:4 by |W| * norm, then pack.
                       // nullptr: `weight` is 2:4 already
  uint16_t* values;    // [rows, cols / 2]
  uint16_t* metadata;  // [rows, cols / 16], in torch's reordered layout
  uint32_t* overfull;  // nullptr, or a counter: groups with more than two non-zeros are added. No norm then
  int64_t rows;        // a multiple of 32
  int64_t cols;        // a multiple of 64
  int64_t row_stride;  // elements
  Dtype dtype;         // kBFloat16 or kFloat16
};

struct Unpack24Params {
  const uint16_t* values;    // [rows, cols / 2]
  const uint16_t* metadata;  // [rows, cols / 16], in torch's reordered layout
  uint16_t* weight;          // [rows, cols], contiguous
  int64_t rows;
  int64_t cols;
};

// Enqueue on `stream`. Return a cudaError_t, 0 on success.
int launch_pack_24(const Pack24Params& params, CUstream_st* stream);
int launch_unpack_24(const Unpack24Params& params, CUstream_st* stream);

}  // namespace wanda::cuda
