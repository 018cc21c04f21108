// Launcher of the column sums of squares on CPU tensors: checks, threads, registration.
#include "sqnorm.h"

#include <torch/library.h>

#include "../checks.h"
#include "dispatch.h"

namespace wanda::cpu {
namespace {

constexpr int64_t kColumnStep = 64;  // threads part a row at cache lines

// `shared_row`: every sequence adds to the same row of sqnorm, in order.
void run(const SqnormParams& params, int64_t sequences, bool shared_row) {
  const auto kernel = WANDA_BY_ISA(sqnorm);
  const int64_t item = params.dtype == Dtype::kFloat32 ? 4 : 2;
  if (!shared_row && sequences >= at::get_num_threads()) {
    at::parallel_for(0, sequences, 1, [&](int64_t begin, int64_t end) {
      for (int64_t sequence = begin; sequence < end; ++sequence) kernel(params, sequence, 0, params.cols);
    });
    return;
  }
  const int64_t steps = (params.cols + kColumnStep - 1) / kColumnStep;
  at::parallel_for(0, steps, 1, [&](int64_t first, int64_t last) {
    const int64_t begin = first * kColumnStep;
    const int64_t end = std::min(last * kColumnStep, params.cols);
    for (int64_t sequence = 0; sequence < sequences; ++sequence) {
      SqnormParams one = params;
      if (shared_row) {
        one.x = static_cast<const char*>(params.x) + sequence * params.sequence_stride * item;
        if (params.token_mask != nullptr) one.token_mask = params.token_mask + sequence * params.tokens;
      }
      kernel(one, shared_row ? 0 : sequence, begin, end);
    }
  });
}

void add_sqnorm_(at::Tensor sqnorm, const at::Tensor& x, const std::optional<at::Tensor>& token_mask) {
  const SqnormShape shape = check_sqnorm("add_sqnorm_", sqnorm, x, token_mask);
  if (shape.sequences == 0 || shape.tokens == 0 || shape.cols == 0) return;
  const at::Tensor inputs = tokens_of(x, shape);
  const at::Tensor mask = token_mask ? token_mask->contiguous() : at::Tensor();
  const SqnormParams params{sqnorm.mutable_data_ptr<float>(),
                            inputs.const_data_ptr(),
                            mask.defined() ? mask.const_data_ptr<bool>() : nullptr,
                            shape.tokens,
                            shape.cols,
                            inputs.stride(0),
                            inputs.stride(1),
                            dtype_of("add_sqnorm_", "x", x)};
  run(params, shape.sequences, sqnorm.dim() == 1);
}

}  // namespace
}  // namespace wanda::cpu

TORCH_LIBRARY_IMPL(wanda, CPU, m) { m.impl("add_sqnorm_", &wanda::cpu::add_sqnorm_); }
