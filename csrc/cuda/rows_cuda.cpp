// Row selection on CUDA tensors: checks, device, stream, registration.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "bindings.h"
#include "rows.h"

namespace wanda::cuda {
namespace {

void run(const char* op, const at::Tensor& weight, const at::Tensor& norm, double sparsity, bool* mask,
         float* score_sums) {
  const int64_t cols = weight.size(1);
  const at::Tensor norms = norm.contiguous();
  const RowsParams params{weight.data_ptr(),
                          norms.const_data_ptr<float>(),
                          mask,
                          score_sums,
                          weight.size(0),
                          cols,
                          row_stride(weight),
                          static_cast<int64_t>(static_cast<double>(cols) * sparsity),
                          dtype_of(op, "weight", weight)};
  check_launch(op, launch_rows(params, c10::cuda::getCurrentCUDAStream()));
}

void check(const char* op, const at::Tensor& weight, const at::Tensor& norm, double sparsity) {
  check_weight(op, weight);
  check_norm(op, norm, weight);
  check_sparsity(op, sparsity);
}

void prune_rows_(at::Tensor weight, const at::Tensor& norm, double sparsity,
                 const std::optional<at::Tensor>& score_sums) {
  check("prune_rows_", weight, norm, sparsity);
  check_score_sums("prune_rows_", score_sums, weight);
  const c10::cuda::CUDAGuard guard(weight.device());
  const at::Tensor rows = with_plain_rows(weight);
  run("prune_rows_", rows, norm, sparsity, nullptr,
      score_sums ? score_sums->mutable_data_ptr<float>() : nullptr);
  if (!rows.is_same(weight)) weight.copy_(rows);
}

at::Tensor row_mask(const at::Tensor& weight, const at::Tensor& norm, double sparsity) {
  check("row_mask", weight, norm, sparsity);
  const c10::cuda::CUDAGuard guard(weight.device());
  at::Tensor mask = at::empty(weight.sizes(), weight.options().dtype(at::kBool));
  run("row_mask", with_plain_rows(weight), norm, sparsity, mask.mutable_data_ptr<bool>(), nullptr);
  return mask;
}

}  // namespace
}  // namespace wanda::cuda

TORCH_LIBRARY_IMPL(wanda, CUDA, m) {
  m.impl("prune_rows_", &wanda::cuda::prune_rows_);
  m.impl("row_mask", &wanda::cuda::row_mask);
}
