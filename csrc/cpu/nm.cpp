// Launchers of N:M selection on CPU tensors: checks, threads, registration.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "../checks.h"
#include "launch.h"

namespace wanda::cpu {
namespace {

void run(const at::Tensor& weight, const at::Tensor& norm, int64_t n, int64_t m, bool* mask,
         float* score_sums) {
  const int64_t cols = weight.size(1);
  if (weight.numel() == 0) return;
  const at::Tensor norms = norm.contiguous();
  const NmParams params{weight.data_ptr(),
                        norms.const_data_ptr<float>(),
                        mask,
                        score_sums,
                        weight.size(0),
                        cols,
                        weight.stride(0),
                        n,
                        m,
                        dtype_of("nm", "weight", weight)};
  over_rows(params.rows, cols, [&](int64_t begin, int64_t end) { kernels().nm(params, begin, end); });
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
  const at::Tensor rows = with_plain_rows(weight);
  run(rows, norm, n, m, nullptr, score_sums ? score_sums->mutable_data_ptr<float>() : nullptr);
  if (!rows.is_same(weight)) weight.copy_(rows);
}

at::Tensor nm_mask(const at::Tensor& weight, const at::Tensor& norm, int64_t n, int64_t m) {
  check("nm_mask", weight, norm, n, m);
  at::Tensor mask = at::empty(weight.sizes(), weight.options().dtype(at::kBool));
  run(with_plain_rows(weight), norm, n, m, mask.mutable_data_ptr<bool>(), nullptr);
  return mask;
}

}  // namespace
}  // namespace wanda::cpu

TORCH_LIBRARY_IMPL(wanda, CPU, m) {
  m.impl("prune_nm_", &wanda::cpu::prune_nm_);
  m.impl("nm_mask", &wanda::cpu::nm_mask);
}
