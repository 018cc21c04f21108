// Launcher of the column sums of squares on CPU tensors: checks, threads, registration.
#include <torch/library.h>

#include "../checks.h"
#include "launch.h"

namespace wanda::cpu {
namespace {

void add_sqnorm_(at::Tensor sqnorm, const at::Tensor& x, const std::optional<at::Tensor>& token_mask) {
  const SqnormShape shape = check_sqnorm("add_sqnorm_", sqnorm, x, token_mask);
  if (shape.sequences == 0 || shape.tokens == 0 || shape.cols == 0) return;
  const at::Tensor inputs = tokens_of(x, shape);
  const at::Tensor mask = token_mask ? token_mask->contiguous() : at::Tensor();
  const SqnormParams params{sqnorm.mutable_data_ptr<float>(),
                            inputs.const_data_ptr(),
                            mask.defined() ? mask.const_data_ptr<bool>() : nullptr,
                            nullptr,
                            shape.sequences,
                            shape.tokens,
                            shape.cols,
                            inputs.stride(0),
                            inputs.stride(1),
                            sqnorm.dim() == 1,
                            dtype_of("add_sqnorm_", "x", x)};
  over_sequences(params.sequences, params.cols, params.is_shared,
                 [&](auto... range) { kernels().sqnorm(params, range...); });
}

}  // namespace
}  // namespace wanda::cpu

TORCH_LIBRARY_IMPL(wanda, CPU, m) { m.impl("add_sqnorm_", &wanda::cpu::add_sqnorm_); }
