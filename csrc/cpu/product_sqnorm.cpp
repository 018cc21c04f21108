// Splits the products over threads: by sequences, or by columns where there are few.
#include "product_sqnorm.h"

#include "dispatch.h"

namespace wanda::cpu {

void run_product_sqnorm(const ProductSqnormParams& params, int64_t sequences) {
  constexpr int64_t kColumnStep = 64;  // threads part a row at cache lines
  const auto kernel = WANDA_BY_ISA(product_sqnorm);
  if (params.sqnorm_stride != 0 && sequences >= at::get_num_threads()) {
    at::parallel_for(0, sequences, 1, [&](int64_t begin, int64_t end) {
      for (int64_t sequence = begin; sequence < end; ++sequence) kernel(params, sequence, 0, params.cols);
    });
    return;
  }
  const int64_t steps = (params.cols + kColumnStep - 1) / kColumnStep;
  at::parallel_for(0, steps, 1, [&](int64_t first, int64_t last) {
    const int64_t end = std::min(last * kColumnStep, params.cols);
    for (int64_t sequence = 0; sequence < sequences; ++sequence) {
      kernel(params, sequence, first * kColumnStep, end);
    }
  });
}

}  // namespace wanda::cpu
