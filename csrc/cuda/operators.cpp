// The operators on CUDA tensors: device, stream, alignment, registration.
#include <ATen/ops/_grouped_mm.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/zeros.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAFunctions.h>
#include <c10/cuda/CUDAGraphsC10Utils.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAMacros.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <tuple>
#include <vector>

#include "../checks.h"
#include "../checks_quantized.h"
#include "../checks_refine.h"
#include "launchers.h"

namespace wanda::cuda {
namespace {

// What plans ask of the current device, of which a thread asks CUDA once.
int current_device(Device& device) {
  thread_local std::array<Device, C10_COMPILE_TIME_MAX_GPUS> known;
  const int index = c10::cuda::current_device();
  Device& here = known.at(index);
  if (here.processors == 0) {
    cudaError_t error =
        cudaDeviceGetAttribute(&here.shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, index);
    if (error == cudaSuccess) {
      error = cudaDeviceGetAttribute(&here.processors, cudaDevAttrMultiProcessorCount, index);
    }
    if (error != cudaSuccess) return error;
  }
  device = here;
  return cudaSuccess;
}

// run(device, stream) on `tensor`'s device; returns a cudaError_t.
template <class Run>
void on_device(const char* op, const at::Tensor& tensor, Run run) {
  const c10::cuda::CUDAGuard guard(tensor.device());
  Device device;
  int error = current_device(device);
  if (error == 0) error = run(device, c10::cuda::getCurrentCUDAStream());
  TORCH_CHECK(error == 0, "wanda::", op,
              ": the launch failed: ", cudaGetErrorString(static_cast<cudaError_t>(error)));
}

// For kernels that have no path for other alignments: such a view is copied.
at::Tensor aligned(const at::Tensor& tensor) {
  const at::Tensor plain = tensor.contiguous();
  return is_aligned(plain.const_data_ptr()) ? plain : plain.clone();
}

// ---- rows, N:M.

// launch(params, device, stream) of all matrices, or of one after the other.
template <class Params, class Launch>
at::Tensor select(const char* op, const Selection<Params>& selection, Launch launch) {
  const int64_t matrices = selection.stack.size(0), columns = matrices * selection.stack.size(2);
  WANDA_CHECK_VALUE(matrices <= kMostMatrices && (matrices == 1 || columns >> 31 == 0),
                    "weight must have at most ", kMostMatrices,
                    " matrices, and together fewer than 2^31 columns, got ", selection.stack.sizes());
  return selection.run([&](const Params& params) {
    on_device(op, selection.stack,
              [&](const Device& device, CUstream_st* stream) { return launch(params, device, stream); });
  });
}

at::Tensor run_rows(const char* op, const Selection<RowsParams>& selection) {
  return select(op, selection, [](const RowsParams& params, const Device& device, CUstream_st* stream) {
    return launch_rows(params, plan_rows(params, device), stream);
  });
}

at::Tensor run_nm(const char* op, const Selection<NmParams>& selection) {
  return select(op, selection, [](const NmParams& params, const Device& device, CUstream_st* stream) {
    return launch_nm(params, plan_nm(params, device), stream);
  });
}

void prune_rows_(at::Tensor weight, const at::Tensor& norm, double sparsity,
                 const OptionalTensor& score_sums) {
  run_rows("prune_rows_", check_rows("prune_rows_", weight, norm, sparsity, false, score_sums));
}

at::Tensor row_mask(const at::Tensor& weight, const at::Tensor& norm, double sparsity) {
  return run_rows("row_mask", check_rows("row_mask", weight, norm, sparsity, true));
}

void prune_nm_(at::Tensor weight, const at::Tensor& norm, int64_t n, int64_t m,
               const OptionalTensor& score_sums) {
  run_nm("prune_nm_", check_nm("prune_nm_", weight, norm, n, m, false, score_sums));
}

at::Tensor nm_mask(const at::Tensor& weight, const at::Tensor& norm, int64_t n, int64_t m) {
  return run_nm("nm_mask", check_nm("nm_mask", weight, norm, n, m, true));
}

// ---- Swaps.

at::Tensor refine(const char* op, const Refinement& refinement) {
  const RefineParams& params = refinement.params;
  if (params.rows == 0) return refinement.swaps;
  on_device(op, refinement.weight, [&](const Device& device, CUstream_st* stream) {
    const RefinePlan plan = plan_refine(params, device);
    const int64_t rows = std::min(plan.band, params.rows);
    const auto sums = refinement.weight.options().dtype(at::kDouble);
    const at::Tensor c = at::empty({rows, params.cols}, sums), errors = at::empty({rows}, sums);
    const at::Tensor diagonal = refinement.gram.diagonal().contiguous();
    return launch_refine(params, plan, c.mutable_data_ptr<double>(), errors.mutable_data_ptr<double>(),
                         diagonal.const_data_ptr<float>(), stream);
  });
  return refinement.swaps;
}

at::Tensor refine_rows_(at::Tensor mask, const at::Tensor& weight, const at::Tensor& gram, double damping,
                        std::optional<int64_t> most_swaps, const OptionalTensor& sums) {
  return refine("refine_rows_",
                check_refine_rows("refine_rows_", mask, weight, gram, damping, most_swaps, sums));
}

// As pack_24, it reads a count back, and without the check where a graph is captured.
at::Tensor refine_nm_(at::Tensor mask, const at::Tensor& weight, const at::Tensor& gram, int64_t n, int64_t m,
                      double damping, int64_t sweeps, const OptionalTensor& sums) {
  const Refinement refinement =
      check_refine_nm("refine_nm_", mask, weight, gram, n, m, damping, sweeps, sums);
  const c10::cuda::CUDAGuard guard(weight.device());
  if (c10::cuda::currentStreamCaptureStatusMayInitCtx() == c10::cuda::CaptureStatus::None) {
    const at::Tensor pruned = mask.view({-1, m}).sum(1);
    check_groups("refine_nm_", pruned.ne(m - n).sum().item<int64_t>(), n, m);
  }
  return refine("refine_nm_", refinement);
}

// ---- Column sums of squares.

void add_sqnorm_(at::Tensor sqnorm, const at::Tensor& x, const OptionalTensor& token_mask,
                 const OptionalTensor& ends) {
  const SqnormArguments arguments = check_add_sqnorm("add_sqnorm_", sqnorm, x, token_mask, ends);
  const SqnormParams& params = arguments.params;
  if (params.sequences == 0) return;
  on_device("add_sqnorm_", x, [&](const Device&, CUstream_st* stream) {
    return launch_sqnorm(params, sqnorm_vector(params), stream);
  });
}

// ---- 2:4 packing.

std::tuple<at::Tensor, at::Tensor> pack(const char* op, const at::Tensor& weight, const at::Tensor& norm,
                                        uint32_t* overfull) {
  const bool fits =
      has_plain_rows(weight.unsqueeze(0)) && is_aligned(weight.const_data_ptr()) && weight.stride(0) % 8 == 0;
  const at::Tensor plain = fits ? weight : aligned(weight);
  at::Tensor values, metadata;
  Pack24Params params = pack_24_params(plain, norm, values, metadata);
  params.overfull = overfull;
  on_device(op, weight, [&](const Device&, CUstream_st* stream) { return launch_pack_24(params, stream); });
  return {values, metadata};
}

// Reads the count of groups that do not fit back to the host, which of these operators only refine_nm_ does
// too; a graph that is being captured cannot, and packs without the check.
std::tuple<at::Tensor, at::Tensor> pack_24(const at::Tensor& weight) {
  check_pack_24("pack_24", weight, nullptr);
  const c10::cuda::CUDAGuard guard(weight.device());
  if (c10::cuda::currentStreamCaptureStatusMayInitCtx() != c10::cuda::CaptureStatus::None) {
    return pack("pack_24", weight, {}, nullptr);
  }
  const at::Tensor overfull = at::zeros({1}, weight.options().dtype(at::kInt));
  const auto packed =
      pack("pack_24", weight, {}, reinterpret_cast<uint32_t*>(overfull.mutable_data_ptr<int>()));
  check_overfull("pack_24", overfull.item<int>());
  return packed;
}

std::tuple<at::Tensor, at::Tensor> prune_pack_24(const at::Tensor& weight, const at::Tensor& norm) {
  check_pack_24("prune_pack_24", weight, &norm);
  return pack("prune_pack_24", weight, aligned(norm), nullptr);
}

at::Tensor unpack_24(const at::Tensor& values, const at::Tensor& metadata) {
  check_unpack_24("unpack_24", values, metadata);
  const at::Tensor plain_values = aligned(values), plain_metadata = aligned(metadata);
  at::Tensor weight;
  const Unpack24Params params = unpack_24_params(plain_values, plain_metadata, weight);
  on_device("unpack_24", values,
            [&](const Device&, CUstream_st* stream) { return launch_unpack_24(params, stream); });
  return weight;
}

// ---- Packed weights. What kernels need aligned is copied where it is not.

constexpr int64_t kBitmapLaunches = 2;  // of kBitmapTokens; more tokens go through the unpacked weight

at::Tensor unpack_bitmap(const at::Tensor& values, const at::Tensor& bitmap, const at::Tensor& starts) {
  PackedWeight weight = check_bitmap("unpack_bitmap", values, bitmap, starts);
  const at::Tensor plain = aligned(values), words = aligned(bitmap);
  const at::Tensor dense = at::empty({weight.rows, weight.cols}, values.options());
  weight.values = plain.const_data_ptr();
  weight.codes = words.const_data_ptr<uint8_t>();
  on_device("unpack_bitmap", values, [&](const Device&, CUstream_st* stream) {
    return launch_unpack_bitmap(weight, dense.data_ptr(), plan_unpack_bitmap(weight), stream);
  });
  return dense;
}

at::Tensor unpack_sparse24(const at::Tensor& values, const at::Tensor& indices) {
  PackedWeight weight = check_sparse24("unpack_sparse24", values, indices);
  const at::Tensor plain = aligned(values), dense = at::empty({weight.rows, weight.cols}, values.options());
  weight.values = plain.const_data_ptr();
  on_device("unpack_sparse24", values, [&](const Device&, CUstream_st* stream) {
    return launch_unpack_sparse24(weight, dense.data_ptr(), stream);
  });
  return dense;
}

// launch(params, device, stream) in steps of at most `most` tokens.
template <class Launch>
at::Tensor in_steps(const char* op, const PackedWeight& weight, const at::Tensor& x,
                    const OptionalTensor& bias, int64_t most, Launch launch) {
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
  shape.back() = weight.rows;
  at::Tensor y = at::empty(shape, x.options());
  const at::Tensor tokens = aligned(x.reshape({-1, weight.cols}));
  const at::Tensor added = bias ? bias->contiguous() : at::Tensor(), rows = y.view({-1, weight.rows});
  for (int64_t first = 0; first < tokens.size(0); first += most) {
    const PackedLinearParams params{weight, tokens[first].const_data_ptr(),
                                    added.defined() ? added.const_data_ptr() : nullptr,
                                    rows[first].data_ptr(), std::min(most, tokens.size(0) - first)};
    on_device(op, x,
              [&](const Device& device, CUstream_st* stream) { return launch(params, device, stream); });
  }
  return y;
}

int64_t tokens_in(const at::Tensor& x) { return x.numel() / std::max<int64_t>(1, x.size(-1)); }

at::Tensor bitmap_linear(const at::Tensor& x, const at::Tensor& values, const at::Tensor& bitmap,
                         const at::Tensor& starts, const OptionalTensor& bias) {
  PackedWeight weight = check_bitmap("bitmap_linear", values, bitmap, starts);
  check_packed_linear("bitmap_linear", weight, values, x, bias);
  if (tokens_in(x) > kBitmapLaunches * kBitmapTokens) {
    return at::linear(x, unpack_bitmap(values, bitmap, starts), bias);
  }
  const at::Tensor plain = aligned(values), words = aligned(bitmap);
  weight.values = plain.const_data_ptr();
  weight.codes = words.const_data_ptr<uint8_t>();
  return in_steps("bitmap_linear", weight, x, bias, kBitmapTokens,
                  [](const PackedLinearParams& params, const Device& device, CUstream_st* stream) {
                    return launch_bitmap_linear(
                        params, plan_bitmap_linear(params.weight, params.tokens, device), stream);
                  });
}

// The sparse tensor cores take 16-bit types (float32 there would be tf32, and 1:2).
at::Tensor sparse24_linear(const at::Tensor& x, const at::Tensor& values, const at::Tensor& indices,
                           const OptionalTensor& bias) {
  PackedWeight weight = check_sparse24("sparse24_linear", values, indices);
  check_packed_linear("sparse24_linear", weight, values, x, bias);
  if (tokens_in(x) > kSparse24Tokens || weight.dtype == Dtype::kFloat32) {
    return at::linear(x, unpack_sparse24(values, indices), bias);
  }
  const at::Tensor plain = aligned(values), codes = aligned(indices);
  weight.values = plain.const_data_ptr();
  weight.codes = codes.const_data_ptr<uint8_t>();
  return in_steps("sparse24_linear", weight, x, bias, kSparse24Tokens,
                  [](const PackedLinearParams& params, const Device& device, CUstream_st* stream) {
                    return launch_sparse24_linear(
                        params, plan_sparse24_linear(params.weight, params.tokens, device), stream);
                  });
}

// The product with unpacked weights, without a word to the host. grouped_mm leaves what is nobody's as it
// was.
at::Tensor grouped(const at::Tensor& x, const at::Tensor& dense, const at::Tensor& ends) {
  const at::Tensor weights = dense.view({ends.size(0), -1, x.size(1)}).transpose(1, 2);
  const at::Tensor nobodys = at::arange(x.size(0), ends.options()).ge(ends[ends.size(0) - 1]).unsqueeze(1);
  return at::_grouped_mm(x.contiguous(), weights, ends).masked_fill_(nobodys, 0);
}

// launch(params, device, stream) of all experts.
template <class Launch>
at::Tensor experts(const char* op, PackedWeight stack, const at::Tensor& values, const at::Tensor& codes,
                   const at::Tensor& x, const at::Tensor& ends, Launch launch) {
  const at::Tensor plain = aligned(values), words = aligned(codes), tokens = aligned(x);
  stack.values = plain.const_data_ptr();
  stack.codes = words.const_data_ptr<uint8_t>();
  at::Tensor y = at::zeros({x.size(0), stack.rows / ends.size(0)}, x.options());
  if (x.size(0) == 0) return y;
  const PackedExpertsParams params{
      stack,       tokens.const_data_ptr(), ends.const_data_ptr<int32_t>(), y.mutable_data_ptr(), x.size(0),
      ends.size(0)};
  on_device(op, x, [&](const Device& device, CUstream_st* stream) { return launch(params, device, stream); });
  return y;
}

at::Tensor bitmap_experts(const at::Tensor& x, const at::Tensor& values, const at::Tensor& bitmap,
                          const at::Tensor& starts, const at::Tensor& ends) {
  const PackedWeight stack = check_bitmap("bitmap_experts", values, bitmap, starts);
  check_experts("bitmap_experts", stack, values, x, ends);
  if (x.size(0) > kExpertsTokens * ends.size(0)) {
    return grouped(x, unpack_bitmap(values, bitmap, starts), ends);
  }
  return experts("bitmap_experts", stack, values, bitmap, x, ends,
                 [](const PackedExpertsParams& params, const Device& device, CUstream_st* stream) {
                   return launch_bitmap_experts(params, plan_bitmap_experts(params, device), stream);
                 });
}

at::Tensor sparse24_experts(const at::Tensor& x, const at::Tensor& values, const at::Tensor& indices,
                            const at::Tensor& ends) {
  const PackedWeight stack = check_sparse24("sparse24_experts", values, indices);
  check_experts("sparse24_experts", stack, values, x, ends);
  if (x.size(0) > kExpertsTokens * ends.size(0) || stack.dtype == Dtype::kFloat32) {
    return grouped(x, unpack_sparse24(values, indices), ends);
  }
  return experts("sparse24_experts", stack, values, indices, x, ends,
                 [](const PackedExpertsParams& params, const Device&, CUstream_st* stream) {
                   return launch_sparse24_experts(params, plan_sparse24_experts(params), stream);
                 });
}

// ---- Packed weights with values of 8 or 4 bits.

at::Tensor unpack_quantized(const at::Tensor& values, const at::Tensor& scales, const OptionalTensor& codes,
                            const OptionalTensor& starts, int64_t bits, at::ScalarType dtype) {
  const char* const op = "unpack_quantized";
  QuantizedWeight weight = check_quantized(op, values, scales, codes, starts, bits);
  WANDA_CHECK_TYPE(dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kHalf,
                   "dtype must be float32, bfloat16 or float16, got ", dtype);
  const at::Tensor plain = aligned(values), words = codes ? aligned(*codes) : at::Tensor();
  const at::Tensor dense = at::empty({weight.rows, weight.cols}, values.options().dtype(dtype));
  weight.values = plain.const_data_ptr<uint8_t>();
  if (codes) weight.codes = words.const_data_ptr<uint8_t>();
  on_device(op, values, [&](const Device&, CUstream_st* stream) {
    return launch_unpack_quantized(weight, dense.data_ptr(), dtype_of(op, "dense", dense),
                                   quantized_plan(weight, 1, kQuantizedWarps), stream);
  });
  return dense;
}

// x [tokens, cols] is rounded into memory of its own, by the same stream.
at::Tensor multiply_quantized(const char* op, QuantizedWeight weight, const at::Tensor& values,
                              const OptionalTensor& codes, const at::Tensor& x, const OptionalTensor& bias,
                              const OptionalTensor& ends) {
  const int64_t tokens = x.size(0), experts = ends ? ends->size(0) : 1;
  const std::array<int64_t, 2> shape{tokens, weight.rows / experts};
  at::Tensor y = ends ? at::zeros(shape, x.options()) : at::empty(shape, x.options());
  if (tokens == 0) return y;
  const at::Tensor plain = aligned(values), words = codes ? aligned(*codes) : at::Tensor();
  const at::Tensor rows = x.contiguous(), added = bias ? bias->contiguous() : at::Tensor();
  const at::Tensor whole = at::empty({tokens, weight.cols * (weight.bits / 4)}, x.options().dtype(at::kChar));
  const at::Tensor factors = at::empty({tokens, weight.groups}, x.options().dtype(at::kFloat));
  weight.values = plain.const_data_ptr<uint8_t>();
  if (codes) weight.codes = words.const_data_ptr<uint8_t>();
  const Dtype dtype = dtype_of(op, "x", x);
  const RoundParams round{rows.const_data_ptr(),
                          whole.mutable_data_ptr<int8_t>(),
                          factors.mutable_data_ptr<float>(),
                          tokens,
                          weight.cols,
                          weight.group,
                          weight.groups,
                          weight.bits,
                          dtype};
  const QuantizedLinearParams params{weight,       round.whole,
                                     round.scales, added.defined() ? added.const_data_ptr() : nullptr,
                                     y.data_ptr(), ends ? ends->const_data_ptr<int32_t>() : nullptr,
                                     tokens,       experts,
                                     dtype};
  on_device(op, x, [&](const Device& device, CUstream_st* stream) {
    const int error = launch_round(round, stream);
    return error != 0 ? error : launch_quantized_linear(params, plan_quantized(params, device), stream);
  });
  return y;
}

at::Tensor quantized_linear(const at::Tensor& x, const at::Tensor& values, const at::Tensor& scales,
                            const OptionalTensor& codes, const OptionalTensor& starts,
                            const OptionalTensor& bias, int64_t bits) {
  const char* const op = "quantized_linear";
  const QuantizedWeight weight = check_quantized(op, values, scales, codes, starts, bits);
  check_quantized_x(op, weight, values, x);
  check_quantized_bias(op, weight, x, bias);
  if (tokens_in(x) > kQuantizedTokens) {
    return at::linear(x, unpack_quantized(values, scales, codes, starts, bits, x.scalar_type()), bias);
  }
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
  shape.back() = weight.rows;
  return multiply_quantized(op, weight, values, codes, x.reshape({-1, weight.cols}), bias, {}).view(shape);
}

at::Tensor quantized_experts(const at::Tensor& x, const at::Tensor& values, const at::Tensor& scales,
                             const at::Tensor& ends, const OptionalTensor& codes,
                             const OptionalTensor& starts, int64_t bits) {
  const char* const op = "quantized_experts";
  const QuantizedWeight stack = check_quantized(op, values, scales, codes, starts, bits);
  check_quantized_experts(op, stack, values, x, ends);
  WANDA_CHECK_VALUE(ends.size(0) <= kMostMatrices, "ends must be of at most ", kMostMatrices,
                    " experts, got ", ends.size(0));
  if (x.size(0) > kQuantizedTokens * ends.size(0)) {
    return grouped(x, unpack_quantized(values, scales, codes, starts, bits, x.scalar_type()), ends);
  }
  return multiply_quantized(op, stack, values, codes, x, {}, ends);
}

}  // namespace
}  // namespace wanda::cuda

TORCH_LIBRARY_IMPL(wanda, CUDA, m) {
  m.impl("prune_rows_", &wanda::cuda::prune_rows_);
  m.impl("row_mask", &wanda::cuda::row_mask);
  m.impl("prune_nm_", &wanda::cuda::prune_nm_);
  m.impl("nm_mask", &wanda::cuda::nm_mask);
  m.impl("refine_rows_", &wanda::cuda::refine_rows_);
  m.impl("refine_nm_", &wanda::cuda::refine_nm_);
  m.impl("add_sqnorm_", &wanda::cuda::add_sqnorm_);
  m.impl("pack_24", &wanda::cuda::pack_24);
  m.impl("prune_pack_24", &wanda::cuda::prune_pack_24);
  m.impl("unpack_24", &wanda::cuda::unpack_24);
  m.impl("bitmap_linear", &wanda::cuda::bitmap_linear);
  m.impl("sparse24_linear", &wanda::cuda::sparse24_linear);
  m.impl("bitmap_experts", &wanda::cuda::bitmap_experts);
  m.impl("sparse24_experts", &wanda::cuda::sparse24_experts);
  m.impl("unpack_bitmap", &wanda::cuda::unpack_bitmap);
  m.impl("unpack_sparse24", &wanda::cuda::unpack_sparse24);
  m.impl("quantized_linear", &wanda::cuda::quantized_linear);
  m.impl("quantized_experts", &wanda::cuda::quantized_experts);
  m.impl("unpack_quantized", &wanda::cuda::unpack_quantized);
}
