// Argument checks of the launchers. An error names the operator, the argument, what is required and what
// came. wanda_kernels/_checks.py says the same for the PyTorch reference and the fake implementations.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <optional>

#include "common/dtype.h"

namespace wanda {

inline Dtype dtype_of(const char* op, const char* argument, const at::Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kFloat:
      return Dtype::kFloat32;
    case at::kBFloat16:
      return Dtype::kBFloat16;
    case at::kHalf:
      return Dtype::kFloat16;
    default:
      TORCH_CHECK_TYPE(false, "wanda::", op, ": ", argument, " must be float32, bfloat16 or float16, got ",
                       tensor.scalar_type());
  }
}

inline void check_weight(const char* op, const at::Tensor& weight) {
  TORCH_CHECK_VALUE(weight.dim() == 2, "wanda::", op, ": weight must have 2 dimensions [C_out, C_in], got ",
                    weight.dim());
  dtype_of(op, "weight", weight);
}

inline void check_norm(const char* op, const at::Tensor& norm, const at::Tensor& weight) {
  TORCH_CHECK_TYPE(norm.scalar_type() == at::kFloat, "wanda::", op, ": norm must be float32, got ",
                   norm.scalar_type());
  TORCH_CHECK_VALUE(norm.device() == weight.device(), "wanda::", op, ": norm is on ", norm.device(),
                    ", weight is on ", weight.device());
  TORCH_CHECK_VALUE(norm.dim() == 1, "wanda::", op, ": norm must have 1 dimension [C_in], got ", norm.dim());
  TORCH_CHECK_VALUE(norm.size(0) == weight.size(1), "wanda::", op, ": norm has ", norm.size(0),
                    " elements, weight has ", weight.size(1), " columns");
}

inline void check_score_sums(const char* op, const std::optional<at::Tensor>& sums,
                             const at::Tensor& weight) {
  if (!sums.has_value()) return;
  TORCH_CHECK_TYPE(sums->scalar_type() == at::kFloat, "wanda::", op, ": score_sums must be float32, got ",
                   sums->scalar_type());
  TORCH_CHECK_VALUE(sums->device() == weight.device(), "wanda::", op, ": score_sums is on ", sums->device(),
                    ", weight is on ", weight.device());
  TORCH_CHECK_VALUE(
      sums->dim() == 2 && sums->size(0) == weight.size(0) && sums->size(1) == 2 && sums->is_contiguous(),
      "wanda::", op, ": score_sums must be contiguous [", weight.size(0), ", 2], got ", sums->sizes());
}

inline void check_sparsity(const char* op, double sparsity) {
  TORCH_CHECK_VALUE(sparsity >= 0 && sparsity < 1, "wanda::", op, ": sparsity must be in [0, 1), got ",
                    sparsity);
}

inline void check_pattern(const char* op, const at::Tensor& weight, int64_t n, int64_t m) {
  TORCH_CHECK_VALUE(0 < n && n < m, "wanda::", op, ": a pattern n:m needs 0 < n < m, got ", n, ":", m);
  TORCH_CHECK_VALUE(weight.size(1) % m == 0, "wanda::", op, ": weight has ", weight.size(1),
                    " columns, not a multiple of m = ", m);
}

inline void check_packable(const char* op, const at::Tensor& weight) {
  check_weight(op, weight);
  TORCH_CHECK_TYPE(weight.scalar_type() == at::kBFloat16 || weight.scalar_type() == at::kHalf, "wanda::", op,
                   ": weight must be bfloat16 or float16 (torch packs float32 as 1:2), got ",
                   weight.scalar_type());
  TORCH_CHECK_VALUE(weight.size(0) % 32 == 0 && weight.size(1) % 64 == 0 && weight.numel() > 0, "wanda::", op,
                    ": weight must have a multiple of 32 rows and of 64 columns, got ", weight.sizes());
}

inline void check_packed(const char* op, const at::Tensor& values, const at::Tensor& metadata) {
  TORCH_CHECK_TYPE(values.scalar_type() == at::kBFloat16 || values.scalar_type() == at::kHalf, "wanda::", op,
                   ": values must be bfloat16 or float16, got ", values.scalar_type());
  TORCH_CHECK_TYPE(metadata.scalar_type() == at::kShort, "wanda::", op, ": metadata must be int16, got ",
                   metadata.scalar_type());
  TORCH_CHECK_VALUE(metadata.device() == values.device(), "wanda::", op, ": metadata is on ",
                    metadata.device(), ", values are on ", values.device());
  TORCH_CHECK_VALUE(
      values.dim() == 2 && values.size(0) % 32 == 0 && values.size(1) % 32 == 0 && values.numel() > 0,
      "wanda::", op, ": values must be [C_out, C_in / 2] with multiples of 32, got ", values.sizes());
  TORCH_CHECK_VALUE(
      metadata.dim() == 2 && metadata.size(0) == values.size(0) && metadata.size(1) * 8 == values.size(1),
      "wanda::", op, ": metadata must be [", values.size(0), ", ", values.size(1) / 8, "], got ",
      metadata.sizes());
}

// Formats of cpu/packed.h. What is in the tensors (counts, order) is checked once, when they are loaded.
inline void check_packed_values(const char* op, const at::Tensor& values, const at::Tensor& codes,
                                const char* name) {
  dtype_of(op, "values", values);
  TORCH_CHECK_TYPE(codes.scalar_type() == at::kByte, "wanda::", op, ": ", name, " must be uint8, got ",
                   codes.scalar_type());
  TORCH_CHECK_VALUE(codes.device() == values.device(), "wanda::", op, ": ", name, " is on ", codes.device(),
                    ", values are on ", values.device());
  TORCH_CHECK_VALUE(codes.dim() == 2 && codes.size(1) % 8 == 0 && codes.numel() > 0 && codes.is_contiguous(),
                    "wanda::", op, ": ", name,
                    " must be contiguous [C_out, C_in / 8] with C_in a multiple of 64, got ", codes.sizes());
  TORCH_CHECK_VALUE(values.is_contiguous(), "wanda::", op, ": values must be contiguous");
}

inline void check_bitmap(const char* op, const at::Tensor& values, const at::Tensor& bitmap,
                         const at::Tensor& starts) {
  check_packed_values(op, values, bitmap, "bitmap");
  TORCH_CHECK_TYPE(starts.scalar_type() == at::kInt, "wanda::", op, ": starts must be int32, got ",
                   starts.scalar_type());
  TORCH_CHECK_VALUE(starts.device() == values.device(), "wanda::", op, ": starts is on ", starts.device(),
                    ", values are on ", values.device());
  TORCH_CHECK_VALUE(starts.dim() == 1 && starts.size(0) == bitmap.size(0) + 1 && starts.is_contiguous(),
                    "wanda::", op, ": starts must be contiguous [", bitmap.size(0) + 1, "], got ",
                    starts.sizes());
  TORCH_CHECK_VALUE(values.dim() == 1 && values.size(0) >= 32, "wanda::", op,
                    ": values must be [kept + 32], got ", values.sizes());
}

inline void check_sparse24(const char* op, const at::Tensor& values, const at::Tensor& indices) {
  check_packed_values(op, values, indices, "indices");
  TORCH_CHECK_VALUE(
      values.dim() == 2 && values.size(0) == indices.size(0) && values.size(1) == indices.size(1) * 4,
      "wanda::", op, ": values must be [", indices.size(0), ", ", indices.size(1) * 4, "], got ",
      values.sizes());
}

inline void check_packed_input(const char* op, const at::Tensor& x, const at::Tensor& values, int64_t cols) {
  TORCH_CHECK_TYPE(x.scalar_type() == values.scalar_type(), "wanda::", op, ": x must be ",
                   values.scalar_type(), ", as values are, got ", x.scalar_type());
  TORCH_CHECK_VALUE(x.device() == values.device(), "wanda::", op, ": x is on ", x.device(),
                    ", values are on ", values.device());
  TORCH_CHECK_VALUE(x.dim() >= 1 && x.size(-1) == cols, "wanda::", op, ": x must be [.., ", cols, "], got ",
                    x.sizes());
}

inline void check_packed_bias(const char* op, const std::optional<at::Tensor>& bias, const at::Tensor& values,
                              int64_t rows) {
  if (!bias.has_value()) return;
  TORCH_CHECK_TYPE(bias->scalar_type() == values.scalar_type(), "wanda::", op, ": bias must be ",
                   values.scalar_type(), ", as values are, got ", bias->scalar_type());
  TORCH_CHECK_VALUE(bias->device() == values.device(), "wanda::", op, ": bias is on ", bias->device(),
                    ", values are on ", values.device());
  TORCH_CHECK_VALUE(bias->dim() == 1 && bias->size(0) == rows, "wanda::", op, ": bias must be [", rows,
                    "], got ", bias->sizes());
}

struct SqnormShape {
  int64_t sequences, tokens, cols;
};

// x is [sequences, tokens, C_in], or flattened [sequences * tokens, C_in] with the sequences from sqnorm.
inline SqnormShape check_sqnorm(const char* op, const at::Tensor& sqnorm, const at::Tensor& x,
                                const std::optional<at::Tensor>& token_mask) {
  TORCH_CHECK_TYPE(sqnorm.scalar_type() == at::kFloat, "wanda::", op, ": sqnorm must be float32, got ",
                   sqnorm.scalar_type());
  dtype_of(op, "x", x);
  TORCH_CHECK_VALUE(sqnorm.device() == x.device(), "wanda::", op, ": sqnorm is on ", sqnorm.device(),
                    ", x is on ", x.device());
  TORCH_CHECK_VALUE((sqnorm.dim() == 1 || sqnorm.dim() == 2) && sqnorm.is_contiguous(), "wanda::", op,
                    ": sqnorm must be contiguous [C_in] or [sequences, C_in], got ", sqnorm.sizes());
  TORCH_CHECK_VALUE(x.dim() == 2 || x.dim() == 3, "wanda::", op,
                    ": x must be [sequences, tokens, C_in] or [tokens, C_in], got ", x.sizes());
  const int64_t cols = sqnorm.size(-1);
  TORCH_CHECK_VALUE(x.size(-1) == cols, "wanda::", op, ": x has ", x.size(-1), " columns, sqnorm has ", cols);
  const int64_t sequences = sqnorm.dim() == 2 ? sqnorm.size(0) : x.dim() == 3 ? x.size(0) : 1;
  if (x.dim() == 3) {
    TORCH_CHECK_VALUE(x.size(0) == sequences, "wanda::", op, ": x has ", x.size(0), " sequences, sqnorm has ",
                      sequences);
  } else {
    TORCH_CHECK_VALUE(sequences > 0 ? x.size(0) % sequences == 0 : x.size(0) == 0, "wanda::", op, ": x has ",
                      x.size(0), " tokens, not a multiple of the ", sequences, " sequences of sqnorm");
  }
  const int64_t tokens = x.dim() == 3 ? x.size(1) : sequences > 0 ? x.size(0) / sequences : 0;
  if (token_mask.has_value()) {
    TORCH_CHECK_TYPE(token_mask->scalar_type() == at::kBool, "wanda::", op, ": token_mask must be bool, got ",
                     token_mask->scalar_type());
    TORCH_CHECK_VALUE(token_mask->device() == x.device(), "wanda::", op, ": token_mask is on ",
                      token_mask->device(), ", x is on ", x.device());
    TORCH_CHECK_VALUE(
        token_mask->numel() == sequences * tokens &&
            (token_mask->dim() == 1 || (token_mask->dim() == 2 && token_mask->size(0) == sequences)),
        "wanda::", op, ": token_mask must be [", sequences, ", ", tokens, "] or flattened, got ",
        token_mask->sizes());
  }
  return {sequences, tokens, cols};
}

inline void check_rms_weight(const char* op, const at::Tensor& weight, const at::Tensor& x) {
  TORCH_CHECK_TYPE(weight.scalar_type() == x.scalar_type(), "wanda::", op, ": weight must be ",
                   x.scalar_type(), ", as x is, got ", weight.scalar_type());
  TORCH_CHECK_VALUE(weight.device() == x.device(), "wanda::", op, ": weight is on ", weight.device(),
                    ", x is on ", x.device());
  TORCH_CHECK_VALUE(weight.dim() == 1 && weight.size(0) == x.size(-1), "wanda::", op, ": weight must be [",
                    x.size(-1), "], got ", weight.sizes());
}

inline void check_up(const char* op, const at::Tensor& up, const at::Tensor& gate) {
  TORCH_CHECK_TYPE(up.scalar_type() == gate.scalar_type(), "wanda::", op, ": up must be ", gate.scalar_type(),
                   ", as gate is, got ", up.scalar_type());
  TORCH_CHECK_VALUE(up.device() == gate.device(), "wanda::", op, ": up is on ", up.device(), ", gate is on ",
                    gate.device());
  TORCH_CHECK_VALUE(up.sizes() == gate.sizes(), "wanda::", op, ": up must be ", gate.sizes(),
                    ", as gate is, got ", up.sizes());
}

// x as [sequences, tokens, C_in] with unit column stride; a copy only where columns are not adjacent.
inline at::Tensor tokens_of(const at::Tensor& x, const SqnormShape& shape) {
  const at::Tensor plain = shape.cols > 1 && x.stride(-1) != 1 ? x.contiguous() : x;
  return plain.dim() == 3 ? plain : plain.unflatten(0, {shape.sequences, shape.tokens});
}

// Rows that a kernel can walk: unit column stride, rows that do not overlap.
inline bool has_plain_rows(const at::Tensor& matrix) {
  return (matrix.size(1) <= 1 || matrix.stride(1) == 1) &&
         (matrix.size(0) <= 1 || matrix.stride(0) >= matrix.size(1));
}

inline at::Tensor with_plain_rows(const at::Tensor& matrix) {
  return has_plain_rows(matrix) ? matrix : matrix.contiguous();
}

}  // namespace wanda
