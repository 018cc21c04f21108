// As checks.h, for packed weights with values of 8 or 4 bits; wanda_kernels/_checks_quantized.py says the
// same.
#pragma once

#include "checks.h"

namespace wanda {

constexpr int64_t kMostQuantizedColumns = int64_t{1} << 20;  // int32 holds their sums

// Columns for each of `scales` scales of a row; 0 where there is no such group.
inline int64_t quantized_group(int64_t cols, int64_t scales) {
  if (scales == 1) return cols;
  for (const int64_t group : {32, 64, 128}) {
    if ((cols + group - 1) / group == scales) return group;
  }
  return 0;
}

inline QuantizedWeight check_quantized(const char* op, const at::Tensor& values, const at::Tensor& scales,
                                       const OptionalTensor& codes, const OptionalTensor& starts,
                                       int64_t bits) {
  check_type(op, "values", values, at::kByte, "uint8");
  check_type(op, "scales", scales, at::kBFloat16, "bfloat16");
  check_device(op, "scales", scales, "values are", values);
  WANDA_CHECK_VALUE(bits == 8 || bits == 4, "bits must be 8 or 4, got ", bits);
  WANDA_CHECK_VALUE(scales.dim() == 2 && scales.numel() > 0 && scales.is_contiguous(),
                    "scales must be contiguous [C_out, groups], got ", scales.sizes());
  QuantizedWeight weight{};
  weight.rows = scales.size(0);
  weight.groups = scales.size(1);
  weight.bits = bits;
  const int64_t stored = bits == 8 ? weight.rows : (weight.rows + 1) / 2;
  const auto check_rows = [&](int64_t cols) {
    WANDA_CHECK_VALUE(
        values.dim() == 2 && values.size(0) == stored && values.size(1) == cols && values.is_contiguous(),
        "values must be contiguous [", stored, ", ", cols, "], got ", values.sizes());
  };
  if (!codes) {
    WANDA_CHECK_VALUE(!starts, "starts must be None without codes");
    WANDA_CHECK_VALUE(values.dim() == 2 && values.size(1) % 64 == 0 && values.size(1) > 0, "values must be [",
                      stored, ", C_in] with C_in a multiple of 64, got ", values.sizes());
    weight.cols = values.size(1);
    check_rows(weight.cols);
  } else {
    check_type(op, "codes", *codes, at::kByte, "uint8");
    check_device(op, "codes", *codes, "values are", values);
    WANDA_CHECK_VALUE(codes->dim() == 2 && codes->size(0) == weight.rows && codes->size(1) % 8 == 0 &&
                          codes->size(1) > 0 && codes->is_contiguous(),
                      "codes must be contiguous [", weight.rows,
                      ", C_in / 8] with C_in a multiple of 64, got ", codes->sizes());
    weight.codes = codes->const_data_ptr<uint8_t>();
    weight.cols = codes->size(1) * 8;
    if (!starts) {
      check_rows(weight.cols / 2);
    } else {
      check_type(op, "starts", *starts, at::kInt, "int32");
      check_device(op, "starts", *starts, "values are", values);
      WANDA_CHECK_VALUE(starts->dim() == 1 && starts->size(0) == stored + 1 && starts->is_contiguous(),
                        "starts must be contiguous [", stored + 1, "], got ", starts->sizes());
      WANDA_CHECK_VALUE(values.dim() == 1 && values.size(0) >= kQuantizedPadding && values.is_contiguous(),
                        "values must be contiguous [bytes + 64], got ", values.sizes());
      weight.starts = starts->const_data_ptr<int32_t>();
    }
  }
  WANDA_CHECK_VALUE(weight.cols <= kMostQuantizedColumns, "the weight must have at most ",
                    kMostQuantizedColumns, " columns, got ", weight.cols);
  weight.group = quantized_group(weight.cols, weight.groups);
  WANDA_CHECK_VALUE(weight.group > 0, "scales must be for 32, 64, 128 or all of the ", weight.cols,
                    " columns, got ", weight.groups, " of a row");
  weight.values = values.const_data_ptr<uint8_t>();
  weight.scales = static_cast<const uint16_t*>(scales.const_data_ptr());
  return weight;
}

inline void check_quantized_x(const char* op, const QuantizedWeight& weight, const at::Tensor& values,
                              const at::Tensor& x) {
  dtype_of(op, "x", x);
  check_device(op, "x", x, "values are", values);
  WANDA_CHECK_VALUE(x.dim() >= 1 && x.size(-1) == weight.cols, "x must be [.., ", weight.cols, "], got ",
                    x.sizes());
}

inline void check_quantized_bias(const char* op, const QuantizedWeight& weight, const at::Tensor& x,
                                 const OptionalTensor& bias) {
  if (!bias) return;
  check_like(op, "bias", *bias, "x is", x);
  WANDA_CHECK_VALUE(bias->dim() == 1 && bias->size(0) == weight.rows, "bias must be [", weight.rows,
                    "], got ", bias->sizes());
}

// Returns C_out of an expert.
inline int64_t check_quantized_experts(const char* op, const QuantizedWeight& stack, const at::Tensor& values,
                                       const at::Tensor& x, const at::Tensor& ends) {
  check_quantized_x(op, stack, values, x);
  WANDA_CHECK_VALUE(x.dim() == 2, "x must be [rows, ", stack.cols, "], got ", x.sizes());
  check_type(op, "ends", ends, at::kInt, "int32");
  check_device(op, "ends", ends, "values are", values);
  WANDA_CHECK_VALUE(
      ends.dim() == 1 && ends.size(0) > 0 && stack.rows % ends.size(0) == 0 && ends.is_contiguous(),
      "ends must be contiguous [E], of a number of experts that divides the ", stack.rows,
      " rows of the weight, got ", ends.sizes());
  const int64_t rows = stack.rows / ends.size(0);
  WANDA_CHECK_VALUE(stack.bits == 8 || rows % 2 == 0, "experts of 4 bits need an even number of rows, got ",
                    rows);
  return rows;
}

// `weight` and `importance`: contiguous copies where they are not. Fills in what the levels and scales are.
struct Quantization {
  QuantizeParams params;
  at::Tensor weight, importance, levels, scales;
};

inline Quantization check_quantize(const char* op, const at::Tensor& weight, int64_t bits, int64_t group,
                                   const OptionalTensor& importance) {
  check_weight(op, weight);
  const int64_t rows = weight.size(0), cols = weight.size(1);
  WANDA_CHECK_VALUE(cols > 0, "weight must have columns, got ", weight.sizes());
  WANDA_CHECK_VALUE(bits == 8 || bits == 4, "bits must be 8 or 4, got ", bits);
  WANDA_CHECK_VALUE(group == 0 || group == 32 || group == 64 || group == 128,
                    "group must be 0 (a whole row), 32, 64 or 128, got ", group);
  Quantization all{};
  QuantizeParams& params = all.params;
  params.rows = rows;
  params.cols = cols;
  params.group = group == 0 || group > cols ? cols : group;
  params.groups = (cols + params.group - 1) / params.group;
  params.bits = bits;
  params.dtype = dtype_of(op, "weight", weight);
  if (importance) {
    check_type(op, "importance", *importance, at::kFloat, "float32");
    check_device(op, "importance", *importance, "weight is", weight);
    WANDA_CHECK_VALUE(importance->dim() == 1 && importance->size(0) == cols, "importance must be [", cols,
                      "], got ", importance->sizes());
    all.importance = importance->contiguous();
    params.importance = all.importance.const_data_ptr<float>();
  }
  all.weight = weight.contiguous();
  all.levels = at::empty({rows, cols}, weight.options().dtype(at::kChar));
  all.scales = at::empty({rows, params.groups}, weight.options().dtype(at::kBFloat16));
  params.weight = all.weight.const_data_ptr();
  params.levels = all.levels.mutable_data_ptr<int8_t>();
  params.scales = static_cast<uint16_t*>(all.scales.mutable_data_ptr());
  return all;
}

inline void check_pack_kept(const char* op, const at::Tensor& values, const at::Tensor& levels,
                            const at::Tensor& mask, const at::Tensor& starts, int64_t bits) {
  check_type(op, "levels", levels, at::kChar, "int8");
  check_type(op, "values", values, at::kByte, "uint8");
  check_type(op, "mask", mask, at::kBool, "bool");
  check_type(op, "starts", starts, at::kInt, "int32");
  check_device(op, "values", values, "levels are", levels);
  check_device(op, "mask", mask, "levels are", levels);
  check_device(op, "starts", starts, "levels are", levels);
  WANDA_CHECK_VALUE(bits == 8 || bits == 4, "bits must be 8 or 4, got ", bits);
  WANDA_CHECK_VALUE(levels.dim() == 2 && levels.is_contiguous(),
                    "levels must be contiguous [C_out, C_in], got ", levels.sizes());
  WANDA_CHECK_VALUE(mask.sizes() == levels.sizes() && mask.is_contiguous(), "mask must be contiguous ",
                    levels.sizes(), ", got ", mask.sizes());
  const int64_t stored = bits == 8 ? levels.size(0) : (levels.size(0) + 1) / 2;
  WANDA_CHECK_VALUE(starts.dim() == 1 && starts.size(0) == stored + 1 && starts.is_contiguous(),
                    "starts must be contiguous [", stored + 1, "], got ", starts.sizes());
  WANDA_CHECK_VALUE(values.dim() == 1 && values.is_contiguous(), "values must be contiguous [bytes], got ",
                    values.sizes());
}

// `uneven`: rows, or pairs of 4 bits, whose bytes are others than `starts` says.
inline void check_kept(const char* op, int64_t uneven) {
  WANDA_CHECK_VALUE(uneven == 0, "starts must be where the values of mask begin, ", uneven,
                    " of its rows take other bytes");
}

}  // namespace wanda
