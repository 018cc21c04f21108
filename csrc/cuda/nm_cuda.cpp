// N:M selection on CUDA tensors: checks, device, stream, registration.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "bindings.h"
#include "nm.h"

namespace wanda::cuda {
namespace {

void run(const char* op, const at::Tensor& weight, const at::Tensor& norm, int64_t n, int64_t m, bool* mask,
         float* score_sums) {
  const at::Tensor norms = norm.contiguous();
  const NmParams params{weight.data_ptr(),
                        norms.const_data_ptr<float>(),
                        mask,
                        score_sums,
                        weight.size(0),
                        weight.size(1),
                        row_stride(weight),
                        n,
                        m,
                        dtype_of(op, "weight", weight)};
  check_launch(op, launch_nm(params, c10::cuda::getCurrentCUDAStream()));
}

void check(const char* op, const at::Tensor& weight, const at::Tensor& norm, int64_t n, int64_t m) {
  check_weight(op, weight);
  check_norm(op, norm, weight);
  check_pattern(op, weight, n, m);
}

void prune_nm_(at::Tensor weight, const at::Tensor& norm, int64_t n, int64_t m,
               const std::optional<at::Tensor>& score_sums) {
  check("prune_nm_", weight, norm, n, m);
  check_score_sums("prune_nm_", score_sums, weight);
  const c10::cuda::CUDAGuard guard(weight.device());
  const at::Tensor rows = with_plain_rows(weight);
  run("prune_nm_", rows, norm, n, m, nullptr, score_sums ? score_sums->mutable_data_ptr<float>() : nullptr);
  if (!rows.is_same(weight)) weight.copy_(rows);
}

at::Tensor nm_mask(const at::Tensor& weight, const at::Tensor& norm, int64_t n, int64_t m) {
  check("nm_mask", weight, norm, n, m);
  const c10::cuda::CUDAGuard guard(weight.device());
  at::Tensor mask = at::empty(weight.sizes(), weight.options().dtype(at::kBool));
  run("nm_mask", with_plain_rows(weight), norm, n, m, mask.mutable_data_ptr<bool>(), nullptr);
  return mask;
}

}  // namespace
}  // namespace wanda::cuda

TORCH_LIBRARY_IMPL(wanda, CUDA, m) {
  m.impl("prune_nm_", &wanda::cuda::prune_nm_);
  m.impl("nm_mask", &wanda::cuda::nm_mask);
}
