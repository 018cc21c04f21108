// Launcher of activation(gate) * up with the column sums of squares of the products, on CPU tensors.
#include <ATen/ops/empty.h>
#include <ATen/ops/gelu.h>
#include <ATen/ops/silu.h>
#include <torch/library.h>

#include "../checks.h"
#include "product_sqnorm.h"

namespace wanda::cpu {
namespace {

// The activation is ATen's: the same bits.
at::Tensor run(const char* op, const at::Tensor& activated, const at::Tensor& up, at::Tensor sqnorm,
               const std::optional<at::Tensor>& token_mask, const SqnormShape& shape) {
  at::Tensor y = at::empty(up.sizes(), up.options());
  if (y.numel() == 0) return y;
  const at::Tensor first = tokens_of(activated, shape), second = tokens_of(up, shape);
  const at::Tensor mask = token_mask ? token_mask->contiguous() : at::Tensor();
  run_product_sqnorm({Product::kMultiply, dtype_of(op, "up", up), first.const_data_ptr(), first.stride(0),
                      first.stride(1), second.const_data_ptr(), second.stride(0), second.stride(1), nullptr,
                      y.data_ptr(), sqnorm.mutable_data_ptr<float>(), sqnorm.dim() == 1 ? 0 : shape.cols,
                      mask.defined() ? mask.const_data_ptr<bool>() : nullptr, shape.tokens, shape.cols},
                     shape.sequences);
  return y;
}

at::Tensor silu_mul_sqnorm(const at::Tensor& gate, const at::Tensor& up, at::Tensor sqnorm,
                           const std::optional<at::Tensor>& token_mask) {
  const SqnormShape shape = check_sqnorm("silu_mul_sqnorm", sqnorm, gate, token_mask);
  check_up("silu_mul_sqnorm", up, gate);
  return run("silu_mul_sqnorm", at::silu(gate), up, sqnorm, token_mask, shape);
}

at::Tensor gelu_tanh_mul_sqnorm(const at::Tensor& gate, const at::Tensor& up, at::Tensor sqnorm,
                                const std::optional<at::Tensor>& token_mask) {
  const SqnormShape shape = check_sqnorm("gelu_tanh_mul_sqnorm", sqnorm, gate, token_mask);
  check_up("gelu_tanh_mul_sqnorm", up, gate);
  return run("gelu_tanh_mul_sqnorm", at::gelu(gate, "tanh"), up, sqnorm, token_mask, shape);
}

}  // namespace
}  // namespace wanda::cpu

TORCH_LIBRARY_IMPL(wanda, CPU, m) {
  m.impl("silu_mul_sqnorm", &wanda::cpu::silu_mul_sqnorm);
  m.impl("gelu_tanh_mul_sqnorm", &wanda::cpu::gelu_tanh_mul_sqnorm);
}
