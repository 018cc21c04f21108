// As checks.h, for add_gram_, refine_rows_, refine_nm_, solve_rows_ and calibrate_levels_.
#pragma once

#include <cmath>

#include "checks_quantized.h"

namespace wanda {

// What a kernel takes, and the tensors that it points into.
struct Refinement {
  RefineParams params;
  at::Tensor weight, gram, swaps;
};

inline void check_products(const char* op, const at::Tensor& weight, const at::Tensor& gram, double damping) {
  const int64_t cols = weight.size(1);
  check_type(op, "gram", gram, at::kFloat, "float32");
  check_device(op, "gram", gram, "weight is", weight);
  WANDA_CHECK_VALUE(gram.dim() == 2 && gram.size(0) == cols && gram.size(1) == cols, "gram must be [", cols,
                    ", ", cols, "], got ", gram.sizes());
  WANDA_CHECK_VALUE(damping >= 0 && std::isfinite(damping), "damping must be finite and >= 0, got ", damping);
}

inline void check_mask_and_gram(const char* op, const at::Tensor& mask, const at::Tensor& weight,
                                const at::Tensor& gram, double damping, const OptionalTensor& sums) {
  check_weight(op, weight);
  const int64_t rows = weight.size(0);
  check_type(op, "mask", mask, at::kBool, "bool");
  check_device(op, "mask", mask, "weight is", weight);
  WANDA_CHECK_VALUE(mask.sizes() == weight.sizes() && mask.is_contiguous(), "mask must be contiguous ",
                    weight.sizes(), ", got ", mask.sizes());
  check_products(op, weight, gram, damping);
  if (sums) {
    check_type(op, "sums", *sums, at::kDouble, "float64");
    check_device(op, "sums", *sums, "weight is", weight);
    WANDA_CHECK_VALUE(
        sums->dim() == 2 && sums->size(0) == rows && sums->size(1) == 2 && sums->is_contiguous(),
        "sums must be contiguous [", rows, ", 2], got ", sums->sizes());
  }
}

inline Refinement check_refine(const char* op, const at::Tensor& mask, const at::Tensor& weight,
                               const at::Tensor& gram, double damping, const OptionalTensor& sums) {
  check_mask_and_gram(op, mask, weight, gram, damping, sums);
  const int64_t rows = weight.size(0), cols = weight.size(1);
  Refinement made{
      {}, weight.contiguous(), gram.contiguous(), at::empty({rows}, weight.options().dtype(at::kInt))};
  made.params.mask = mask.mutable_data_ptr<bool>();
  made.params.weight = made.weight.const_data_ptr();
  made.params.gram = made.gram.const_data_ptr<float>();
  made.params.swaps = made.swaps.mutable_data_ptr<int32_t>();
  made.params.sums = sums ? sums->mutable_data_ptr<double>() : nullptr;
  made.params.damping = damping;
  made.params.rows = rows;
  made.params.cols = cols;
  made.params.dtype = dtype_of(op, "weight", weight);
  return made;
}

inline Refinement check_refine_rows(const char* op, const at::Tensor& mask, const at::Tensor& weight,
                                    const at::Tensor& gram, double damping, std::optional<int64_t> most_swaps,
                                    const OptionalTensor& sums) {
  Refinement made = check_refine(op, mask, weight, gram, damping, sums);
  WANDA_CHECK_VALUE(most_swaps.value_or(0) >= 0, "most_swaps must be None or >= 0, got ", *most_swaps);
  made.params.most_swaps = most_swaps.value_or(std::max<int64_t>(1, made.params.cols / 16));
  return made;
}

// But for the groups: check_groups.
inline Refinement check_refine_nm(const char* op, const at::Tensor& mask, const at::Tensor& weight,
                                  const at::Tensor& gram, int64_t n, int64_t m, double damping,
                                  int64_t sweeps, const OptionalTensor& sums) {
  Refinement made = check_refine(op, mask, weight, gram, damping, sums);
  check_pattern(op, weight, n, m);
  WANDA_CHECK_VALUE(sweeps >= 0, "sweeps must be >= 0, got ", sweeps);
  made.params.m = m;
  made.params.sweeps = sweeps;
  return made;
}

inline void check_groups(const char* op, int64_t uneven, int64_t n, int64_t m) {
  WANDA_CHECK_VALUE(uneven == 0, "mask must keep ", n, " of every ", m, " columns, ", uneven,
                    " of its groups do not");
}

constexpr int64_t kGramStep = 384;  // GRAM_STEP of wanda_kernels/_checks.py

inline void check_gram(const char* op, const at::Tensor& gram, const at::Tensor& x, int64_t first) {
  check_type(op, "gram", gram, at::kFloat, "float32");
  dtype_of(op, "x", x);
  check_device(op, "gram", gram, "x is", x);
  WANDA_CHECK_VALUE(x.dim() == 2, "x must have 2 dimensions [tokens, C_in], got ", x.dim());
  const int64_t cols = x.size(1);
  WANDA_CHECK_VALUE(first >= 0 && first <= cols && first % kGramStep == 0, "first must be a multiple of ",
                    kGramStep, " in [0, ", cols, "], got ", first);
  WANDA_CHECK_VALUE(gram.dim() == 2 && gram.size(1) == cols && first + gram.size(0) <= cols,
                    "gram must be [rows, ", cols, "] with at most ", cols - first, " rows, got ",
                    gram.sizes());
}

inline void check_solve(const char* op, const at::Tensor& weight, const at::Tensor& mask,
                        const at::Tensor& gram, const at::Tensor& target, double damping, int64_t steps,
                        const OptionalTensor& sums) {
  check_mask_and_gram(op, mask, weight, gram, damping, sums);
  check_like(op, "target", target, "weight is", weight);
  WANDA_CHECK_VALUE(target.sizes() == weight.sizes(), "target must be ", weight.sizes(), ", got ",
                    target.sizes());
  WANDA_CHECK_VALUE(steps >= 0, "steps must be >= 0, got ", steps);
}

// Returns the columns of a scale.
inline int64_t check_levels(const char* op, const at::Tensor& levels, const at::Tensor& weight,
                            const at::Tensor& scales, const at::Tensor& gram, int64_t bits, double damping,
                            int64_t passes, const OptionalTensor& errors) {
  check_weight(op, weight);
  const int64_t rows = weight.size(0), cols = weight.size(1);
  check_type(op, "levels", levels, at::kChar, "int8");
  check_device(op, "levels", levels, "weight is", weight);
  WANDA_CHECK_VALUE(levels.sizes() == weight.sizes(), "levels must be ", weight.sizes(), ", got ",
                    levels.sizes());
  check_type(op, "scales", scales, at::kBFloat16, "bfloat16");
  check_device(op, "scales", scales, "weight is", weight);
  WANDA_CHECK_VALUE(scales.dim() == 2 && scales.size(0) == rows, "scales must be [", rows, ", groups], got ",
                    scales.sizes());
  const int64_t group = quantized_group(cols, scales.size(1));
  WANDA_CHECK_VALUE(group > 0, "scales must be for 32, 64, 128 or all of the ", cols, " columns, got ",
                    scales.size(1), " of a row");
  check_products(op, weight, gram, damping);
  WANDA_CHECK_VALUE(bits == 8 || bits == 4, "bits must be 8 or 4, got ", bits);
  WANDA_CHECK_VALUE(passes >= 0, "passes must be >= 0, got ", passes);
  if (errors) {
    check_type(op, "errors", *errors, at::kDouble, "float64");
    check_device(op, "errors", *errors, "weight is", weight);
    WANDA_CHECK_VALUE(errors->dim() == 1 && errors->size(0) == rows && errors->is_contiguous(),
                      "errors must be contiguous [", rows, "], got ", errors->sizes());
  }
  return group;
}

}  // namespace wanda
