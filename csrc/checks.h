// Arguments of the operators, checked and made into what kernels take, once for the CPU's launchers and
// CUDA's. An error names the operator, the argument, what is required and what came. wanda_kernels/_checks.py
// says the same for the PyTorch reference and the fake implementations.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/util/Exception.h>

#include <optional>
#include <vector>

#include "common/params.h"

namespace wanda {

using OptionalTensor = std::optional<at::Tensor>;

// In functions that have `op`, the operator's name.
#define WANDA_CHECK_TYPE(condition, ...) TORCH_CHECK_TYPE(condition, "wanda::", op, ": ", __VA_ARGS__)
#define WANDA_CHECK_VALUE(condition, ...) TORCH_CHECK_VALUE(condition, "wanda::", op, ": ", __VA_ARGS__)

inline Dtype dtype_of(const char* op, const char* name, const at::Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kFloat:
      return Dtype::kFloat32;
    case at::kBFloat16:
      return Dtype::kBFloat16;
    case at::kHalf:
      return Dtype::kFloat16;
    default:
      WANDA_CHECK_TYPE(false, name, " must be float32, bfloat16 or float16, got ", tensor.scalar_type());
  }
}

inline void check_type(const char* op, const char* name, const at::Tensor& tensor, at::ScalarType type,
                       const char* type_name) {
  WANDA_CHECK_TYPE(tensor.scalar_type() == type, name, " must be ", type_name, ", got ",
                   tensor.scalar_type());
}

// `other_is`: "weight is", "values are".
inline void check_device(const char* op, const char* name, const at::Tensor& tensor, const char* other_is,
                         const at::Tensor& other) {
  WANDA_CHECK_VALUE(tensor.device() == other.device(), name, " is on ", tensor.device(), ", ", other_is,
                    " on ", other.device());
}

inline void check_like(const char* op, const char* name, const at::Tensor& tensor, const char* other_is,
                       const at::Tensor& other) {
  WANDA_CHECK_TYPE(tensor.scalar_type() == other.scalar_type(), name, " must be ", other.scalar_type(),
                   ", as ", other_is, ", got ", tensor.scalar_type());
  check_device(op, name, tensor, other_is, other);
}

// ---- Selection: prune_rows_, row_mask, prune_nm_, nm_mask.

// From one row of a stack of matrices [E, rows, cols] to the next, where they are evenly strided. A single
// row may have any stride; kernels look at it for alignment.
inline int64_t row_stride(const at::Tensor& stack) {
  return stack.size(1) > 1 ? stack.stride(1) : stack.size(0) > 1 ? stack.stride(0) : stack.size(2);
}

// Rows that a kernel can walk: unit column stride, evenly strided, rows that do not overlap.
inline bool has_plain_rows(const at::Tensor& stack) {
  const int64_t stride = row_stride(stack);
  return (stack.size(2) <= 1 || stack.stride(2) == 1) && stride >= stack.size(2) &&
         (stack.size(0) <= 1 || stack.stride(0) == stack.size(1) * stride);
}

inline void check_weight(const char* op, const at::Tensor& weight) {
  WANDA_CHECK_VALUE(weight.dim() == 2, "weight must have 2 dimensions [C_out, C_in], got ", weight.dim());
  dtype_of(op, "weight", weight);
}

// A matrix or a stack of them.
inline void check_weights(const char* op, const at::Tensor& weight) {
  WANDA_CHECK_VALUE(weight.dim() == 2 || weight.dim() == 3,
                    "weight must have 2 dimensions [C_out, C_in] or 3 [E, C_out, C_in], got ", weight.dim());
  dtype_of(op, "weight", weight);
}

inline void check_norm(const char* op, const at::Tensor& norm, const at::Tensor& weight) {
  check_type(op, "norm", norm, at::kFloat, "float32");
  check_device(op, "norm", norm, "weight is", weight);
  WANDA_CHECK_VALUE(norm.dim() == weight.dim() - 1, "norm must have ",
                    weight.dim() == 2 ? "1 dimension [C_in]" : "2 dimensions [E, C_in]", ", got ",
                    norm.dim());
  WANDA_CHECK_VALUE(norm.size(-1) == weight.size(-1), "norm has ", norm.size(-1), " elements, weight has ",
                    weight.size(-1), " columns");
  WANDA_CHECK_VALUE(weight.dim() == 2 || norm.size(0) == weight.size(0), "norm has ", norm.size(0),
                    " rows, weight has ", weight.size(0), " matrices");
}

// What a kernel takes, and the tensors that it points into.
template <class Params>
struct Selection {
  Params params;     // but for `weight` and `row_stride`, which run() knows
  at::Tensor stack;  // the weight as [E, C_out, C_in]
  at::Tensor norms;
  at::Tensor mask;  // undefined where weights are pruned

  // launch(params) for all rows where they are evenly strided, else for a copy of one matrix after the other,
  // which goes back to where it came from. Returns the mask.
  template <class Launch>
  at::Tensor run(Launch launch) const {
    if (params.rows == 0 || params.cols == 0) return mask;
    Params part = params;
    if (has_plain_rows(stack)) {
      part.weight = stack.data_ptr();
      part.row_stride = row_stride(stack);
      launch(part);
      return mask;
    }
    part.rows = params.norm_rows;
    part.row_stride = params.cols;
    for (int64_t matrix = 0; matrix < stack.size(0); ++matrix) {
      const at::Tensor own = stack.select(0, matrix), copy = own.contiguous();
      part.weight = copy.data_ptr();
      launch(part);
      if (!mask.defined()) own.copy_(copy);
      part.norm += params.cols;
      if (part.mask != nullptr) part.mask += part.rows * params.cols;
      if (part.score_sums != nullptr) part.score_sums += 2 * part.rows;
    }
    return mask;
  }
};

// `is_mask`: a new mask, else pruned in place.
template <class Params>
Selection<Params> selection_of(const char* op, const at::Tensor& weight, const at::Tensor& norm, bool is_mask,
                               const OptionalTensor& sums) {
  if (sums) {
    check_type(op, "score_sums", *sums, at::kFloat, "float32");
    check_device(op, "score_sums", *sums, "weight is", weight);
    std::vector<int64_t> shape(weight.sizes().begin(), weight.sizes().end());
    shape.back() = 2;
    WANDA_CHECK_VALUE(sums->sizes() == shape && sums->is_contiguous(), "score_sums must be contiguous ",
                      at::IntArrayRef(shape), ", got ", sums->sizes());
  }
  Selection<Params> made{{}, weight.dim() == 3 ? weight : weight.unsqueeze(0), norm.contiguous(), {}};
  if (is_mask) made.mask = at::empty(weight.sizes(), weight.options().dtype(at::kBool));
  made.params.norm = made.norms.template const_data_ptr<float>();
  made.params.mask = is_mask ? made.mask.template mutable_data_ptr<bool>() : nullptr;
  made.params.score_sums = sums ? sums->template mutable_data_ptr<float>() : nullptr;
  made.params.rows = made.stack.size(0) * made.stack.size(1);
  made.params.cols = made.stack.size(2);
  made.params.norm_rows = made.stack.size(1);
  made.params.dtype = dtype_of(op, "weight", weight);
  return made;
}

inline Selection<RowsParams> check_rows(const char* op, const at::Tensor& weight, const at::Tensor& norm,
                                        double sparsity, bool is_mask, const OptionalTensor& sums = {}) {
  check_weights(op, weight);
  check_norm(op, norm, weight);
  WANDA_CHECK_VALUE(sparsity >= 0 && sparsity < 1, "sparsity must be in [0, 1), got ", sparsity);
  Selection<RowsParams> made = selection_of<RowsParams>(op, weight, norm, is_mask, sums);
  made.params.k = static_cast<int64_t>(static_cast<double>(weight.size(-1)) * sparsity);
  return made;
}

inline void check_pattern(const char* op, const at::Tensor& weight, int64_t n, int64_t m) {
  WANDA_CHECK_VALUE(0 < n && n < m, "a pattern n:m needs 0 < n < m, got ", n, ":", m);
  WANDA_CHECK_VALUE(weight.size(-1) % m == 0, "weight has ", weight.size(-1),
                    " columns, not a multiple of m = ", m);
}

inline Selection<NmParams> check_nm(const char* op, const at::Tensor& weight, const at::Tensor& norm,
                                    int64_t n, int64_t m, bool is_mask, const OptionalTensor& sums = {}) {
  check_weights(op, weight);
  check_norm(op, norm, weight);
  check_pattern(op, weight, n, m);
  Selection<NmParams> made = selection_of<NmParams>(op, weight, norm, is_mask, sums);
  made.params.n = n;
  made.params.m = m;
  return made;
}

// ---- pack_24, prune_pack_24, unpack_24.

inline bool is_packable(const at::Tensor& tensor) {
  return tensor.scalar_type() == at::kBFloat16 || tensor.scalar_type() == at::kHalf;
}

inline uint16_t* bits_of(const at::Tensor& tensor) { return static_cast<uint16_t*>(tensor.data_ptr()); }

inline void check_pack_24(const char* op, const at::Tensor& weight, const at::Tensor* norm) {
  check_weight(op, weight);
  WANDA_CHECK_TYPE(is_packable(weight),
                   "weight must be bfloat16 or float16 (torch packs float32 as 1:2), got ",
                   weight.scalar_type());
  WANDA_CHECK_VALUE(weight.size(0) % 32 == 0 && weight.size(1) % 64 == 0 && weight.numel() > 0,
                    "weight must have a multiple of 32 rows and of 64 columns, got ", weight.sizes());
  if (norm != nullptr) check_norm(op, *norm, weight);
}

// After check_pack_24: new tensors, and `weight` (plain rows) packed into them. `norm`: contiguous, or
// undefined.
inline Pack24Params pack_24_params(const at::Tensor& weight, const at::Tensor& norm, at::Tensor& values,
                                   at::Tensor& metadata) {
  const int64_t rows = weight.size(0), cols = weight.size(1);
  values = at::empty({rows, cols / 2}, weight.options());
  metadata = at::empty({rows, cols / 16}, weight.options().dtype(at::kShort));
  return {bits_of(weight),
          norm.defined() ? norm.const_data_ptr<float>() : nullptr,
          bits_of(values),
          bits_of(metadata),
          nullptr,
          rows,
          cols,
          weight.stride(0),
          dtype_of("pack_24", "weight", weight)};
}

inline void check_overfull(const char* op, int64_t groups) {
  WANDA_CHECK_VALUE(groups == 0, "weight must be 2:4 sparse, ", groups,
                    " of its groups of four have more than two non-zeros");
}

inline void check_unpack_24(const char* op, const at::Tensor& values, const at::Tensor& metadata) {
  WANDA_CHECK_TYPE(is_packable(values), "values must be bfloat16 or float16, got ", values.scalar_type());
  check_type(op, "metadata", metadata, at::kShort, "int16");
  check_device(op, "metadata", metadata, "values are", values);
  WANDA_CHECK_VALUE(
      values.dim() == 2 && values.size(0) % 32 == 0 && values.size(1) % 32 == 0 && values.numel() > 0,
      "values must be [C_out, C_in / 2] with multiples of 32, got ", values.sizes());
  WANDA_CHECK_VALUE(
      metadata.dim() == 2 && metadata.size(0) == values.size(0) && metadata.size(1) * 8 == values.size(1),
      "metadata must be [", values.size(0), ", ", values.size(1) / 8, "], got ", metadata.sizes());
}

// After check_unpack_24: a new weight, and contiguous tensors unpacked into it.
inline Unpack24Params unpack_24_params(const at::Tensor& values, const at::Tensor& metadata,
                                       at::Tensor& weight) {
  const int64_t rows = values.size(0), cols = values.size(1) * 2;
  weight = at::empty({rows, cols}, values.options());
  return {bits_of(values), bits_of(metadata), bits_of(weight), rows, cols};
}

// ---- Packed weights. What is in the tensors (counts, order) is checked once, when they are loaded.

inline PackedWeight packed_weight(const char* op, const at::Tensor& values, const at::Tensor& codes,
                                  const char* name) {
  const Dtype dtype = dtype_of(op, "values", values);
  check_type(op, name, codes, at::kByte, "uint8");
  check_device(op, name, codes, "values are", values);
  WANDA_CHECK_VALUE(codes.dim() == 2 && codes.size(1) % 8 == 0 && codes.numel() > 0 && codes.is_contiguous(),
                    name, " must be contiguous [C_out, C_in / 8] with C_in a multiple of 64, got ",
                    codes.sizes());
  WANDA_CHECK_VALUE(values.is_contiguous(), "values must be contiguous");
  return {values.const_data_ptr(),
          codes.const_data_ptr<uint8_t>(),
          nullptr,
          codes.size(0),
          codes.size(1) * 8,
          dtype};
}

inline PackedWeight check_bitmap(const char* op, const at::Tensor& values, const at::Tensor& bitmap,
                                 const at::Tensor& starts) {
  PackedWeight weight = packed_weight(op, values, bitmap, "bitmap");
  check_type(op, "starts", starts, at::kInt, "int32");
  check_device(op, "starts", starts, "values are", values);
  WANDA_CHECK_VALUE(starts.dim() == 1 && starts.size(0) == weight.rows + 1 && starts.is_contiguous(),
                    "starts must be contiguous [", weight.rows + 1, "], got ", starts.sizes());
  WANDA_CHECK_VALUE(values.dim() == 1 && values.size(0) >= kPackedPadding, "values must be [kept + 32], got ",
                    values.sizes());
  weight.starts = starts.const_data_ptr<int32_t>();
  return weight;
}

inline PackedWeight check_sparse24(const char* op, const at::Tensor& values, const at::Tensor& indices) {
  const PackedWeight weight = packed_weight(op, values, indices, "indices");
  WANDA_CHECK_VALUE(values.dim() == 2 && values.size(0) == weight.rows && values.size(1) == weight.cols / 2,
                    "values must be [", weight.rows, ", ", weight.cols / 2, "], got ", values.sizes());
  return weight;
}

// `is`: "values are", by the argument's name.
inline void check_packed_linear(const char* op, const PackedWeight& weight, const at::Tensor& values,
                                const at::Tensor& x, const OptionalTensor& bias,
                                const char* is = "values are") {
  check_like(op, "x", x, is, values);
  WANDA_CHECK_VALUE(x.dim() >= 1 && x.size(-1) == weight.cols, "x must be [.., ", weight.cols, "], got ",
                    x.sizes());
  if (!bias) return;
  check_like(op, "bias", *bias, is, values);
  WANDA_CHECK_VALUE(bias->dim() == 1 && bias->size(0) == weight.rows, "bias must be [", weight.rows,
                    "], got ", bias->sizes());
}

inline PackedWeight check_dense_linear(const char* op, const at::Tensor& x, const at::Tensor& weight,
                                       const OptionalTensor& bias) {
  const Dtype dtype = dtype_of(op, "weight", weight);
  WANDA_CHECK_VALUE(weight.dim() == 2 && weight.is_contiguous(),
                    "weight must be contiguous [C_out, C_in], got ", weight.sizes(), " with strides ",
                    weight.strides());
  const PackedWeight dense = {weight.const_data_ptr(), nullptr,        nullptr,
                              weight.size(0),          weight.size(1), dtype};
  check_packed_linear(op, dense, weight, x, bias, "weight is");
  return dense;
}

// x [rows, C_in] sorted by expert, `ends` [E] where each expert's rows end, `stack` [E * C_out, C_in].
// Returns C_out.
inline int64_t check_experts(const char* op, const PackedWeight& stack, const at::Tensor& values,
                             const at::Tensor& x, const at::Tensor& ends) {
  check_like(op, "x", x, "values are", values);
  WANDA_CHECK_VALUE(x.dim() == 2 && x.size(1) == stack.cols, "x must be [rows, ", stack.cols, "], got ",
                    x.sizes());
  check_type(op, "ends", ends, at::kInt, "int32");
  check_device(op, "ends", ends, "values are", values);
  WANDA_CHECK_VALUE(
      ends.dim() == 1 && ends.size(0) > 0 && stack.rows % ends.size(0) == 0 && ends.is_contiguous(),
      "ends must be contiguous [E], of a number of experts that divides the ", stack.rows,
      " rows of the weight, got ", ends.sizes());
  return stack.rows / ends.size(0);
}

// ---- add_sqnorm_, rms_norm_sqnorm, silu_mul_sqnorm, gelu_tanh_mul_sqnorm.

struct SqnormShape {
  int64_t sequences, tokens, cols;
};

inline SqnormShape check_segments(const char* op, const at::Tensor& sqnorm, const at::Tensor& x,
                                  const OptionalTensor& token_mask, const at::Tensor& ends) {
  WANDA_CHECK_VALUE(!token_mask, "token_mask must be None where ends are given: leave those rows out of x");
  WANDA_CHECK_VALUE(sqnorm.dim() == 2, "sqnorm must be [segments, C_in] where ends are given, got ",
                    sqnorm.sizes());
  WANDA_CHECK_VALUE(x.dim() == 2, "x must be [rows, C_in] where ends are given, got ", x.sizes());
  check_type(op, "ends", ends, at::kInt, "int32");
  check_device(op, "ends", ends, "x is", x);
  WANDA_CHECK_VALUE(ends.dim() == 1 && ends.size(0) == sqnorm.size(0) && ends.is_contiguous(),
                    "ends must be contiguous [", sqnorm.size(0), "], got ", ends.sizes());
  return {sqnorm.size(0), x.size(0), x.size(1)};
}

// x is [sequences, tokens, C_in], or flattened [sequences * tokens, C_in] with the sequences from sqnorm.
// With `ends`: segments, and all rows.
inline SqnormShape check_sqnorm(const char* op, const at::Tensor& sqnorm, const at::Tensor& x,
                                const OptionalTensor& token_mask, const OptionalTensor& ends = {}) {
  check_type(op, "sqnorm", sqnorm, at::kFloat, "float32");
  dtype_of(op, "x", x);
  check_device(op, "sqnorm", sqnorm, "x is", x);
  WANDA_CHECK_VALUE((sqnorm.dim() == 1 || sqnorm.dim() == 2) && sqnorm.is_contiguous(),
                    "sqnorm must be contiguous [C_in] or [sequences, C_in], got ", sqnorm.sizes());
  WANDA_CHECK_VALUE(x.dim() == 2 || x.dim() == 3,
                    "x must be [sequences, tokens, C_in] or [tokens, C_in], got ", x.sizes());
  const int64_t cols = sqnorm.size(-1);
  WANDA_CHECK_VALUE(x.size(-1) == cols, "x has ", x.size(-1), " columns, sqnorm has ", cols);
  if (ends) return check_segments(op, sqnorm, x, token_mask, *ends);
  const int64_t sequences = sqnorm.dim() == 2 ? sqnorm.size(0) : x.dim() == 3 ? x.size(0) : 1;
  if (x.dim() == 3) {
    WANDA_CHECK_VALUE(x.size(0) == sequences, "x has ", x.size(0), " sequences, sqnorm has ", sequences);
  } else {
    WANDA_CHECK_VALUE(sequences > 0 ? x.size(0) % sequences == 0 : x.size(0) == 0, "x has ", x.size(0),
                      " tokens, not a multiple of the ", sequences, " sequences of sqnorm");
  }
  const int64_t tokens = x.dim() == 3 ? x.size(1) : sequences > 0 ? x.size(0) / sequences : 0;
  if (token_mask) {
    check_type(op, "token_mask", *token_mask, at::kBool, "bool");
    check_device(op, "token_mask", *token_mask, "x is", x);
    WANDA_CHECK_VALUE(
        token_mask->numel() == sequences * tokens &&
            (token_mask->dim() == 1 || (token_mask->dim() == 2 && token_mask->size(0) == sequences)),
        "token_mask must be [", sequences, ", ", tokens, "] or flattened, got ", token_mask->sizes());
  }
  return {sequences, tokens, cols};
}

// What is in `ends`, which only the CPU looks at: to CUDA's kernels any value is safe.
inline void check_ends(const char* op, const at::Tensor& ends, int64_t rows) {
  const int32_t* const end = ends.const_data_ptr<int32_t>();
  for (int64_t s = 0; s < ends.size(0); ++s) {
    const int32_t begin = s == 0 ? 0 : end[s - 1];
    WANDA_CHECK_VALUE(begin <= end[s] && end[s] <= rows, "ends must ascend from 0 to at most ", rows,
                      ", the rows of x, got ends[", s, "] = ", end[s], " after ", begin);
  }
}

inline at::Tensor with_unit_columns(const at::Tensor& x) {
  return x.size(-1) > 1 && x.stride(-1) != 1 ? x.contiguous() : x;
}

// x as [sequences, tokens, C_in] with unit column stride; a copy only where columns are not adjacent.
inline at::Tensor tokens_of(const at::Tensor& x, const SqnormShape& shape) {
  const at::Tensor plain = with_unit_columns(x);
  return plain.dim() == 3 ? plain : plain.unflatten(0, {shape.sequences, shape.tokens});
}

// What a kernel takes, and the tensors that it points into.
struct SqnormArguments {
  SqnormParams params{};
  at::Tensor x, token_mask;
};

// No sequences, tokens or columns: nothing to do, and no pointers.
inline SqnormArguments check_add_sqnorm(const char* op, const at::Tensor& sqnorm, const at::Tensor& x,
                                        const OptionalTensor& token_mask, const OptionalTensor& ends) {
  const SqnormShape shape = check_sqnorm(op, sqnorm, x, token_mask, ends);
  SqnormArguments made;
  if (shape.sequences == 0 || shape.tokens == 0 || shape.cols == 0) return made;
  made.x = ends ? with_unit_columns(x) : tokens_of(x, shape);
  if (token_mask) made.token_mask = token_mask->contiguous();
  made.params = {sqnorm.mutable_data_ptr<float>(),
                 made.x.const_data_ptr(),
                 token_mask ? made.token_mask.const_data_ptr<bool>() : nullptr,
                 ends ? ends->const_data_ptr<int32_t>() : nullptr,
                 shape.sequences,
                 shape.tokens,
                 shape.cols,
                 ends ? 0 : made.x.stride(0),
                 made.x.stride(-2),
                 sqnorm.dim() == 1,
                 dtype_of(op, "x", x)};
  return made;
}

inline SqnormShape check_rms_norm_sqnorm(const char* op, const at::Tensor& x, const at::Tensor& weight,
                                         const at::Tensor& sqnorm, const OptionalTensor& token_mask) {
  const SqnormShape shape = check_sqnorm(op, sqnorm, x, token_mask);
  check_like(op, "weight", weight, "x is", x);
  WANDA_CHECK_VALUE(weight.dim() == 1 && weight.size(0) == x.size(-1), "weight must be [", x.size(-1),
                    "], got ", weight.sizes());
  return shape;
}

inline SqnormShape check_act_mul_sqnorm(const char* op, const at::Tensor& gate, const at::Tensor& up,
                                        const at::Tensor& sqnorm, const OptionalTensor& token_mask) {
  const SqnormShape shape = check_sqnorm(op, sqnorm, gate, token_mask);
  check_like(op, "up", up, "gate is", gate);
  WANDA_CHECK_VALUE(up.sizes() == gate.sizes(), "up must be ", gate.sizes(), ", as gate is, got ",
                    up.sizes());
  return shape;
}

}  // namespace wanda
