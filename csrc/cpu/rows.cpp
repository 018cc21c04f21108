// Launchers of row selection on CPU tensors: checks, threads, registration.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "../checks.h"
#include "launch.h"

namespace wanda::cpu {
namespace {

void run(const at::Tensor& weight, const at::Tensor& norm, double sparsity, bool* mask, float* score_sums) {
  const int64_t cols = weight.size(1);
  if (weight.numel() == 0) return;
  const at::Tensor norms = norm.contiguous();
  const RowsParams params{weight.data_ptr(),
                          norms.const_data_ptr<float>(),
                          mask,
                          score_sums,
                          weight.size(0),
                          cols,
                          weight.stride(0),
                          static_cast<int64_t>(static_cast<double>(cols) * sparsity),
                          dtype_of("rows", "weight", weight)};
  over_rows(params.rows, cols, [&](int64_t begin, int64_t end) { kernels().rows(params, begin, end); });
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
  const at::Tensor rows = with_plain_rows(weight);
  run(rows, norm, sparsity, nullptr, score_sums ? score_sums->mutable_data_ptr<float>() : nullptr);
  if (!rows.is_same(weight)) weight.copy_(rows);
}

at::Tensor row_mask(const at::Tensor& weight, const at::Tensor& norm, double sparsity) {
  check("row_mask", weight, norm, sparsity);
  at::Tensor mask = at::empty(weight.sizes(), weight.options().dtype(at::kBool));
  run(with_plain_rows(weight), norm, sparsity, mask.mutable_data_ptr<bool>(), nullptr);
  return mask;
}

}  // namespace
}  // namespace wanda::cpu

TORCH_LIBRARY_IMPL(wanda, CPU, m) {
  m.impl("prune_rows_", &wanda::cpu::prune_rows_);
  m.impl("row_mask", &wanda::cpu::row_mask);
}
