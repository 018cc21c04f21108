// 2:4 packing on the CPU: the layout of torch's SparseSemiStructuredTensorCUTLASS for 16-bit types.
// Torch-free; see pack_24_impl.h.
#pragma once

#include "../common/dtype.h"

namespace wanda::cpu {

struct Pack24Params {
  const uint16_t* weight;  // [rows, cols], unit column stride, rows `row_stride` elements apart
  const float* norm;       // [cols]: select 2:4 by |W| * norm, then pack. nullptr: `weight` is 2:4 already
  uint16_t* values;        // [rows, cols / 2]
  uint16_t* metadata;      // [rows, cols / 16], in torch's reordered layout
  int64_t rows;            // of the whole matrix: the reordering depends on it. A multiple of 32
  int64_t cols;            // a multiple of 64
  int64_t row_stride;      // elements
  Dtype dtype;             // kBFloat16 or kFloat16
};

// Rows [begin, end). Returns how many groups of four had more than two non-zeros (0 where norm is given).
int64_t pack_24_scalar(const Pack24Params& params, int64_t begin, int64_t end);
int64_t pack_24_avx2(const Pack24Params& params, int64_t begin, int64_t end);
int64_t pack_24_avx512(const Pack24Params& params, int64_t begin, int64_t end);

struct Unpack24Params {
  const uint16_t* values;    // [rows, cols / 2]
  const uint16_t* metadata;  // [rows, cols / 16], in torch's reordered layout
  uint16_t* weight;          // [rows, cols], contiguous
  int64_t rows;
  int64_t cols;
};

// Rows [begin, end), any instruction set: not on a hot path.
void unpack_24(const Unpack24Params& params, int64_t begin, int64_t end);

}  // namespace wanda::cpu
