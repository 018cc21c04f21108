// Column sums of squares on CUDA tensors: checks, device, stream, workspace, registration.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "bindings.h"
#include "sqnorm.h"

namespace wanda::cuda {
namespace {

void add_sqnorm_(at::Tensor sqnorm, const at::Tensor& x, const std::optional<at::Tensor>& token_mask) {
  const SqnormShape shape = check_sqnorm("add_sqnorm_", sqnorm, x, token_mask);
  if (shape.sequences == 0 || shape.tokens == 0 || shape.cols == 0) return;
  const c10::cuda::CUDAGuard guard(x.device());
  // A flattened x has the strides of [sequences, tokens, C_in] without being viewed: tokens in a row.
  at::Tensor inputs = shape.cols > 1 && x.stride(-1) != 1 ? x.contiguous() : x;
  const int64_t token_stride = inputs.stride(-2);
  const int64_t sequence_stride = inputs.dim() == 3 ? inputs.stride(0) : token_stride * shape.tokens;
  const at::Tensor mask = token_mask ? token_mask->contiguous() : at::Tensor();
  const at::Tensor workspace =
      at::empty({shape.sequences * sqnorm_chunks(shape.tokens), shape.cols}, sqnorm.options());
  const SqnormParams params{sqnorm.mutable_data_ptr<float>(),
                            inputs.const_data_ptr(),
                            mask.defined() ? mask.const_data_ptr<bool>() : nullptr,
                            workspace.mutable_data_ptr<float>(),
                            shape.sequences,
                            shape.tokens,
                            shape.cols,
                            sequence_stride,
                            token_stride,
                            sqnorm.dim() == 1,
                            dtype_of("add_sqnorm_", "x", x)};
  check_launch("add_sqnorm_", launch_sqnorm(params, c10::cuda::getCurrentCUDAStream()));
}

}  // namespace
}  // namespace wanda::cuda

TORCH_LIBRARY_IMPL(wanda, CUDA, m) { m.impl("add_sqnorm_", &wanda::cuda::add_sqnorm_); }
