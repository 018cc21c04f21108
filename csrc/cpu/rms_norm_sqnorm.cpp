// Launcher of RMSNorm with the column sums of squares of its output, on CPU tensors.
#include <ATen/ops/add.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mean.h>
#include <ATen/ops/pow.h>
#include <ATen/ops/rsqrt.h>
#include <torch/library.h>

#include "../checks.h"
#include "product_sqnorm.h"

namespace wanda::cpu {
namespace {

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
  run_product_sqnorm({unit_offset ? Product::kUnitOffset : Product::kScaleThenWeight,
                      dtype_of("rms_norm_sqnorm", "x", x), inputs.const_data_ptr(), inputs.stride(0),
                      inputs.stride(1), weights.const_data_ptr(), 0, 0, scale.const_data_ptr<float>(),
                      y.data_ptr(), sqnorm.mutable_data_ptr<float>(), sqnorm.dim() == 1 ? 0 : shape.cols,
                      mask.defined() ? mask.const_data_ptr<bool>() : nullptr, shape.tokens, shape.cols},
                     shape.sequences);
  return y;
}

}  // namespace
}  // namespace wanda::cpu

TORCH_LIBRARY_IMPL(wanda, CPU, m) { m.impl("rms_norm_sqnorm", &wanda::cpu::rms_norm_sqnorm); }
