// The elementwise operations that make the input of a linear layer, with the column sums of squares of what
// they make, on the CPU: for rms_norm_sqnorm.cpp and act_mul_sqnorm.cpp. Torch-free; see
// product_sqnorm_impl.h.
#pragma once

#include "../common/dtype.h"

namespace wanda::cpu {

// round(): to the dtype, to nearest even; NaN becomes a quiet NaN.
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

// Sequence `sequence`, columns [begin, end). One thread; calls for disjoint columns, or for sequences that do
// not share a row of sqnorm, may run at the same time. Sums as sqnorm_*() of sqnorm.h does, to the bit.
void product_sqnorm_scalar(const ProductSqnormParams& params, int64_t sequence, int64_t begin, int64_t end);
void product_sqnorm_avx2(const ProductSqnormParams& params, int64_t sequence, int64_t begin, int64_t end);
void product_sqnorm_avx512(const ProductSqnormParams& params, int64_t sequence, int64_t begin, int64_t end);

// All sequences, in threads.
void run_product_sqnorm(const ProductSqnormParams& params, int64_t sequences);

}  // namespace wanda::cpu
