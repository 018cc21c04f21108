// The instruction sets that the CPU kernels are compiled for, the one in use, and its kernels.
//
// One pattern for all operators. An instruction set is a type, Scalar (scalar.h), Avx2 (vector_avx2.h) or
// Avx512 (vector_avx512.h), that says what a register is and how it is loaded. An operator's algorithm,
// <stem>_impl.h, takes it as `template <class Vector>`; what it needs in intrinsics of its own is a
// specialisation of its Steps, in <stem>_<set>.h. One file for each set, isa_<set>.cpp, compiles all
// operators for it and puts them into a table; launchers call kernels().rows(..).
#pragma once

#include "../common/params.h"

namespace wanda::cpu {

// kAvx2 means AVX2, FMA, F16C and BMI2; kAvx512 means kAvx2 and AVX-512 F, BW, CD, DQ and VL.
enum class Isa : int { kScalar, kAvx2, kAvx512 };

// The elementwise operations that make the input of a linear layer. round(): to the dtype, to nearest even;
// NaN becomes a quiet NaN.
enum class Product : int {
  kScaleThenWeight,  // LLaMA's RMSNorm: y = round(round(a * scale) * b)
  kUnitOffset,       // Gemma's: y = round(a * scale * (1 + b)), in float32 but for the end
  kMultiply,         // y = round(a * b)
};

struct ProductSqnormParams {
  Product product;
  Dtype dtype;
  const void* a;              // [sequences, tokens, cols], unit column stride
  int64_t a_sequence_stride;  // elements
  int64_t a_token_stride;
  const void* b;  // as a; or the weight [cols], both strides 0
  int64_t b_sequence_stride;
  int64_t b_token_stride;
  const float* scale;      // [sequences, tokens] contiguous; nullptr for kMultiply
  void* y;                 // [sequences, tokens, cols] contiguous
  float* sqnorm;           // the sum over each sequence's squares of y is added to its row
  int64_t sqnorm_stride;   // cols, or 0 where all sequences share a row
  const bool* token_mask;  // nullptr, or [sequences, tokens] contiguous: false = counts for y alone
  int64_t tokens;          // per sequence
  int64_t cols;
};

constexpr int64_t kLevelsRows = 96;     // SOLVED_ROWS of wanda_kernels/reference: of a tile
constexpr int64_t kLevelsColumns = 64;  // of a block, at most

// A tile's rows, a block of its columns; `rows` is kLevelsRows.
struct LevelsBlock {
  const float* gram;        // [cols, cols] of it
  int64_t gram_stride;      // elements, from row to row
  const float* extra;       // [cols]: what damping adds to the diagonal
  const float* per_square;  // [cols]: 1 / the damped diagonal, 0 where that is 0
  const float* steps;       // [groups, rows]: scales, of all columns
  const float* per_step;    // [groups, rows]: 1 / steps, 0 where they are 0
  const float* target;      // [cols, rows]
  float* slope;             // [cols, rows]: gram @ difference over all columns, without damping; is used up
  float* levels;            // [cols, rows]: whole numbers
  float* difference;        // [cols, rows]: levels * steps - target
  int64_t first;            // column of the block
  int64_t cols;             // 1 .. kLevelsColumns
  int64_t group;            // columns of a scale
  float most;               // levels are -most .. most - 1
};

constexpr int64_t kPackedSlab = 8;  // rows of x that a kernel takes at once

// How a packed product wants x: slabs of at most kPackedSlab rows, each contiguous; in a slab blocks of
// `unit` columns; in a block the slab's rows one after the other. `as_float`: float32, else the dtype of the
// weights.
struct PackedLayout {
  int64_t unit;
  bool as_float;
};

// The columns of x in that layout: filled up with zeros.
inline int64_t packed_columns(const PackedWeight& weight) { return (weight.cols + 63) / 64 * 64; }

constexpr int64_t kQuantizedLanes = 16;  // of four columns each, in every 64
constexpr int64_t kQuantizedSlab = 4;    // rows of x that a kernel takes at once
constexpr int64_t kQuantizedRows = 8;    // rows of a weight, likewise

// Rows of x rounded to whole numbers, for products with values of 8 or 4 bits. In slabs of `slab` rows: each
// slab's blocks of 64 columns, parts and rows of scales follow those of the slab before. A part is what is
// added up before it is scaled: the blocks of a group, or one block in groups of 32. Planes: 2 beside 8 bits,
// else 1.
struct QuantizedColumns {
  int8_t*
      whole;  // [blocks, slab, planes * 64]: int16, or the upper bytes and the lower ones: as the set has it
  int32_t*
      starts;     // [parts, slab, planes, lanes]: - offset * the sum of a lane's columns; as the set needs it
  float* scales;  // [slab, groups]
  int64_t batch;  // 1, 2 or whole slabs of 4
  int64_t slab;   // 1, 2 or 4
};

// One thread each; calls for disjoint ranges may run at the same time.
struct Kernels {
  // Rows [begin, end). pack_24 returns how many groups of four had more than two non-zeros (0 with norms).
  void (*rows)(const RowsParams& params, int64_t begin, int64_t end);
  void (*nm)(const NmParams& params, int64_t begin, int64_t end);
  int64_t (*pack_24)(const Pack24Params& params, int64_t begin, int64_t end);

  // Rows [begin, end), better many at once: their products with G share its rows.
  void (*refine)(const RefineParams& params, int64_t begin, int64_t end);

  // The level of each kept weight that is best beside all others as they are, a column after the other.
  void (*levels)(const LevelsBlock& block);

  // Sequence (or segment) `sequence`, columns [begin, end). A column's sum takes its tokens in order in
  // float32, each square rounded before it is added (no fused multiply-add): the order and rounding of
  // torch.norm(x.t(), dim=1), on which the official code's masks stand. After every kChunk tokens the sum
  // goes to a float64 total, which is rounded once to float32 and added to sqnorm: the same bits for every
  // instruction set, number of threads and split of columns.
  void (*sqnorm)(const SqnormParams& params, int64_t sequence, int64_t begin, int64_t end);
  void (*product_sqnorm)(const ProductSqnormParams& params, int64_t sequence, int64_t begin, int64_t end);

  // sums[row * batch + b] = W[row] . x[b] for rows [begin, end); batch of 1, 2, 4, or whole slabs; x in the
  // layout, aligned to 64 bytes. `dense`: [rows, cols] contiguous.
  PackedLayout (*packed_layout)(const PackedWeight& weight);
  void (*packed_product)(const PackedWeight& weight, const void* x, int64_t batch, float* sums, int64_t begin,
                         int64_t end);
  void (*packed_unpack)(const PackedWeight& weight, void* dense, int64_t begin, int64_t end);

  // As wanda_kernels/reference/quantized.py, to the bit. `round`: slabs [begin, end) of `columns`, of x
  // [tokens, cols]; rows past its end are 0. `product`: as packed_product, `begin` is even. `scratch`:
  // quantized_scratch(weight) bytes.
  void (*quantized_round)(const QuantizedWeight& weight, const void* x, Dtype dtype, int64_t tokens,
                          const QuantizedColumns& columns, int64_t begin, int64_t end);
  void (*quantized_product)(const QuantizedWeight& weight, const QuantizedColumns& columns, float* sums,
                            int64_t begin, int64_t end, void* scratch);
  void (*quantized_unpack)(const QuantizedWeight& weight, void* dense, Dtype dtype, int64_t begin,
                           int64_t end, void* scratch);

  // Rows [begin, end), as wanda_kernels/reference/quantize.py, to the bit. Returns how many groups hold NaN
  // or infinity; their levels and scales are not written. `scratch`: quantize_scratch(params) floats.
  int64_t (*quantize)(const QuantizeParams& params, int64_t begin, int64_t end, float* scratch);

  // Likewise; stops at a group that has no such levels, and returns whether all have.
  bool (*exact_levels)(const QuantizeParams& params, int64_t begin, int64_t end, float* scratch);
};

// A row as bytes, or the masks of a group of rows.
inline int64_t quantized_scratch(const QuantizedWeight& weight) { return weight.cols; }

// A group's values and what they count, and sums of its blocks of columns.
inline int64_t quantize_scratch(const QuantizeParams& params) { return 3 * params.group + 64; }

// Those of the set in use.
const Kernels& kernels();

Kernels scalar_kernels();
Kernels avx2_kernels();
Kernels avx512_kernels();

const char* name_of(Isa isa);

// The best set that this processor and this build have.
Isa best_isa();

// The set in use: best_isa() unless WANDA_KERNELS_ISA or set_isa chose another.
// Throws std::invalid_argument for an unknown name or one that this processor lacks.
Isa active_isa();
void set_isa(const char* name);

}  // namespace wanda::cpu
