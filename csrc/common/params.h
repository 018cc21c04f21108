// What the kernels take, on the CPU and on CUDA: raw pointers and sizes. Strides and positions are in
// elements; matrices have unit column stride. csrc/checks.h makes these from tensors.
#pragma once

#include "dtype.h"

namespace wanda {

// The k smallest |W| * norm of each row.
struct RowsParams {
  void* weight;       // [rows, cols]: those of one matrix, or of several one behind the other
  const float* norm;  // [rows / norm_rows, cols]: row r takes row r / norm_rows. The CPU's kernels: [cols]
  bool* mask;         // nullptr: pruned weights become +0 in place.
                      // Else [rows, cols] contiguous: receives true = pruned, `weight` is only read.
  float* score_sums;  // nullptr, or [rows, 2]: sum of the squared scores that are pruned, and of all.
                      // CUDA: not together with `mask`
  int64_t rows;
  int64_t cols;  // >= 1, < 2^31 (CUDA: 2^32)
  int64_t row_stride;
  int64_t norm_rows;  // of a matrix
  int64_t k;          // how many of each row to prune, 0 <= k <= cols
  Dtype dtype;
};

// The m - n smallest |W| * norm of every m columns.
struct NmParams {
  void* weight;  // as in RowsParams
  const float* norm;
  bool* mask;
  float* score_sums;
  int64_t rows;
  int64_t cols;  // a multiple of m
  int64_t row_stride;
  int64_t norm_rows;
  int64_t n;  // kept in each group
  int64_t m;  // size of a group, 0 < n < m
  Dtype dtype;
};

// A mask made better by swaps.
struct RefineParams {
  bool* mask;          // [rows, cols] contiguous, true = pruned: changed in place
  const void* weight;  // [rows, cols] contiguous
  const float* gram;   // [cols, cols] contiguous, symmetric
  int32_t* swaps;      // [rows]
  double* sums;        // nullptr, or [rows, 2]: the error before and after
  double damping;
  int64_t rows;
  int64_t cols;
  int64_t most_swaps;  // of a row, where m = 0
  int64_t m;           // swaps in groups of m columns, of which cols is a multiple; 0: in whole rows
  int64_t sweeps;      // over the groups
  Dtype dtype;
};

// 2:4 packing: the layout of torch's SparseSemiStructuredTensorCUTLASS for 16-bit types. CUDA: all pointers
// and rows are 16-byte aligned.
struct Pack24Params {
  const uint16_t* weight;  // [rows, cols]
  const float* norm;       // [cols]: select 2:4 by |W| * norm, then pack. nullptr: `weight` is 2:4 already
  uint16_t* values;        // [rows, cols / 2]
  uint16_t* metadata;      // [rows, cols / 16], in torch's reordered layout
  uint32_t* overfull;      // nullptr, or a counter (CUDA): groups with more than two non-zeros are added
  int64_t rows;            // of the whole matrix: the reordering depends on it. A multiple of 32
  int64_t cols;            // a multiple of 64
  int64_t row_stride;
  Dtype dtype;  // kBFloat16 or kFloat16
};

// Where torch's reordering puts metadata column `column` (16 dense columns each) of `row`.
inline int64_t pack_24_position(int64_t row, int64_t column, int64_t rows) {
  const int64_t to = row / 32 * 32 + row % 8 * 4 + row % 32 / 8;
  return (column / 2 * rows + to / 2 * 2 + column % 2) * 2 + to % 2;
}

struct Unpack24Params {
  const uint16_t* values;    // [rows, cols / 2]
  const uint16_t* metadata;  // [rows, cols / 16], in torch's reordered layout
  uint16_t* weight;          // [rows, cols], contiguous
  int64_t rows;
  int64_t cols;
};

// Column sums of squares.
struct SqnormParams {
  float* sqnorm;           // [sequences, cols] or [cols] (`is_shared`): each sequence's sum is added
  const void* x;           // [sequences, tokens, cols]; with `ends`: [tokens, cols]
  const bool* token_mask;  // nullptr, or [sequences, tokens] contiguous: false = the token does not count
  const int32_t* ends;  // nullptr, or [sequences]: sequence s has the tokens ends[s - 1] .. ends[s] of x, the
                        // first one those from 0 on. Not together with `token_mask` or `is_shared`
  int64_t sequences;
  int64_t tokens;  // per sequence; with `ends`: in all
  int64_t cols;
  int64_t sequence_stride;  // of x; with `ends`: 0
  int64_t token_stride;     // of x
  bool is_shared;           // all sequences add to one row of sqnorm, in order
  Dtype dtype;
};

// A packed weight [rows, cols], cols a multiple of 64. Both formats keep the weights that are not +0 in
// order, and one code byte for every eight columns:
//   bitmap    bit i: column i is kept. Row r's values begin at starts[r].
//   2:4       two of every four columns are kept, their indices in ascending order: bits 0-3 are
//             index 0 | index 1 << 2 of the first four, bits 4-7 of the others. Row r's values begin at
//             r * cols / 2.
// On the CPU also a dense one, of any number of columns: values [rows, cols], no codes and no starts.
struct PackedWeight {
  const void* values;     // bitmap: kPackedPadding more than there are; 2:4: [rows, cols / 2]
  const uint8_t* codes;   // [rows, cols / 8]; dense: nullptr
  const int32_t* starts;  // bitmap: [rows + 1]; else nullptr
  int64_t rows, cols;
  Dtype dtype;
};

// A packed weight [rows, cols] with values of 8 or 4 bits (wanda_kernels/packed/values.py): a kept value is
// (stored - offset) * scale, with an offset of 128 or 8. Of 4 bits rows 2p (low halves) and 2p + 1 (high)
// share bytes.
struct QuantizedWeight {
  const uint8_t* values;   // bitmap: kQuantizedPadding more than there are; 2:4: [rows, cols / 2]; dense:
                           // [rows, cols]. Of 4 bits: half as many rows
  const uint16_t* scales;  // bfloat16, [rows, groups]
  const uint8_t* codes;    // [rows, cols / 8], as in PackedWeight; nullptr: every column is kept
  const int32_t* starts;   // bitmap: [rows + 1], or [ceil(rows / 2) + 1] of 4 bits; else nullptr
  int64_t rows, cols;      // cols: a multiple of 64
  int64_t group;           // columns of a scale: cols, 32, 64 or 128
  int64_t groups;          // scales of a row
  int64_t bits;            // 8 or 4
};

// A weight as levels and scales (wanda_kernels/reference/quantize.py).
struct QuantizeParams {
  const void* weight;       // [rows, cols] contiguous
  const float* importance;  // nullptr, or [cols]
  int8_t* levels;           // [rows, cols]
  uint16_t* scales;         // bfloat16, [rows, groups]
  int64_t rows;
  int64_t cols;
  int64_t group;  // columns of a scale, at most cols
  int64_t groups;
  int64_t bits;  // 8 or 4
  Dtype dtype;
};

// y = x W^T + bias on CUDA. `values`, `codes` and x are 16-byte aligned.
struct PackedLinearParams {
  PackedWeight weight;
  const void* x;     // [tokens, cols]
  const void* bias;  // [rows] or nullptr
  void* y;           // [tokens, rows]
  int64_t tokens;
};

// y = x W^T on CUDA, each row of x with its own expert's W. All but `ends` are 16-byte aligned.
struct PackedExpertsParams {
  PackedWeight stack;   // [experts * rows of a weight, cols]
  const void* x;        // [tokens, cols], sorted by expert
  const int32_t* ends;  // [experts]: where each expert's tokens end
  void* y;              // [tokens, rows of a weight], 0 where no expert's tokens are
  int64_t tokens;
  int64_t experts;
};

// Rows of x as products with QuantizedWeight on CUDA take them: whole numbers, to 16 bits beside 8, to 8
// beside 4, with a scale for each row and group (wanda_kernels/reference/quantized.py). Sixteen columns lie
// together: of 16 bits their upper bytes, then their lower ones, both signed: 256 * upper + lower.
struct RoundParams {
  const void* x;  // [tokens, cols]
  int8_t* whole;  // [tokens, cols / 16, bits / 4, 16], 16-byte aligned
  float* scales;  // [tokens, groups]
  int64_t tokens;
  int64_t cols;
  int64_t group;  // as in QuantizedWeight
  int64_t groups;
  int64_t bits;  // of the weight's values
  Dtype dtype;
};

// y = x W^T + bias on CUDA, or each row of x with its own expert's W. `values` and `codes` are 16-byte
// aligned.
struct QuantizedLinearParams {
  QuantizedWeight weight;  // of all experts
  const int8_t* whole;     // as in RoundParams
  const float* scales;
  const void* bias;     // [rows of a weight] or nullptr
  void* y;              // [tokens, rows of a weight]; where no expert's tokens are, it is left as it is
  const int32_t* ends;  // nullptr: one weight for all tokens; else as in PackedExpertsParams
  int64_t tokens;
  int64_t experts;
  Dtype dtype;  // of bias and y
};

// Products of bitmaps may read this many values past the last one: they load whole registers.
constexpr int64_t kPackedPadding = 32;
constexpr int64_t kQuantizedPadding = 64;  // bytes

}  // namespace wanda
