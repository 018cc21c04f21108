// Launchers of the elementwise operations that make the input of a linear layer, with the column sums of
// squares of what they make, on CPU tensors: RMSNorm and activation(gate) * up.
#include <ATen/ops/add.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/gelu.h>
#include <ATen/ops/mean.h>
#include <ATen/ops/pow.h>
#include <ATen/ops/rsqrt.h>
#include <ATen/ops/silu.h>
#include <torch/library.h>

#include "../checks.h"
#include "launch.h"

namespace wanda::cpu {
namespace {

void run(const ProductSqnormParams& params, int64_t sequences) {
  over_sequences(sequences, params.cols, params.sqnorm_stride == 0,
                 [&](auto... range) { kernels().product_sqnorm(params, range...); });
}

// The variance is ATen's, in float32, and the products round where transformers rounds: the same bits.
at::Tensor rms_norm_sqnorm(const at::Tensor& x, const at::Tensor& weight, double eps, at::Tensor sqnorm,
                           const std::optional<at::Tensor>& token_mask, bool unit_offset) {
  const SqnormShape shape = check_sqnorm("rms_norm_sqnorm", sqnorm, x, token_mask);
  check_rms_weight("rms_norm_sqnorm", weight, x);
  at::Tensor y = at::empty(x.sizes(), x.options());
  if (y.numel() == 0) return y;
  const at::Tensor scale =
      at::rsqrt(at::add(at::mean(at::pow(x.to(at::kFloat), 2), {-1}, true), eps)).contiguous();
  const at::Tensor inputs = tokens_of(x, shape), weights = weight.contiguous();
  const at::Tensor mask = token_mask ? token_mask->contiguous() : at::Tensor();
  run({unit_offset ? Product::kUnitOffset : Product::kScaleThenWeight, dtype_of("rms_norm_sqnorm", "x", x),
       inputs.const_data_ptr(), inputs.stride(0), inputs.stride(1), weights.const_data_ptr(), 0, 0,
       scale.const_data_ptr<float>(), y.data_ptr(), sqnorm.mutable_data_ptr<float>(),
       sqnorm.dim() == 1 ? 0 : shape.cols, mask.defined() ? mask.const_data_ptr<bool>() : nullptr,
       shape.tokens, shape.cols},
      shape.sequences);
  return y;
}

// The activation is ATen's: the same bits.
at::Tensor act_mul(const char* op, const at::Tensor& activated, const at::Tensor& up, at::Tensor sqnorm,
                   const std::optional<at::Tensor>& token_mask, const SqnormShape& shape) {
  at::Tensor y = at::empty(up.sizes(), up.options());
  if (y.numel() == 0) return y;
  const at::Tensor first = tokens_of(activated, shape), second = tokens_of(up, shape);
  const at::Tensor mask = token_mask ? token_mask->contiguous() : at::Tensor();
  run({Product::kMultiply, dtype_of(op, "up", up), first.const_data_ptr(), first.stride(0), first.stride(1),
       second.const_data_ptr(), second.stride(0), second.stride(1), nullptr, y.data_ptr(),
       sqnorm.mutable_data_ptr<float>(), sqnorm.dim() == 1 ? 0 : shape.cols,
       mask.defined() ? mask.const_data_ptr<bool>() : nullptr, shape.tokens, shape.cols},
      shape.sequences);
  return y;
}

at::Tensor silu_mul_sqnorm(const at::Tensor& gate, const at::Tensor& up, at::Tensor sqnorm,
                           const std::optional<at::Tensor>& token_mask) {
  const SqnormShape shape = check_sqnorm("silu_mul_sqnorm", sqnorm, gate, token_mask);
  check_up("silu_mul_sqnorm", up, gate);
  return act_mul("silu_mul_sqnorm", at::silu(gate), up, sqnorm, token_mask, shape);
}

at::Tensor gelu_tanh_mul_sqnorm(const at::Tensor& gate, const at::Tensor& up, at::Tensor sqnorm,
                                const std::optional<at::Tensor>& token_mask) {
  const SqnormShape shape = check_sqnorm("gelu_tanh_mul_sqnorm", sqnorm, gate, token_mask);
  check_up("gelu_tanh_mul_sqnorm", up, gate);
  return act_mul("gelu_tanh_mul_sqnorm", at::gelu(gate, "tanh"), up, sqnorm, token_mask, shape);
}

}  // namespace
}  // namespace wanda::cpu

TORCH_LIBRARY_IMPL(wanda, CPU, m) {
  m.impl("rms_norm_sqnorm", &wanda::cpu::rms_norm_sqnorm);
  m.impl("silu_mul_sqnorm", &wanda::cpu::silu_mul_sqnorm);
  m.impl("gelu_tanh_mul_sqnorm", &wanda::cpu::gelu_tanh_mul_sqnorm);
}
