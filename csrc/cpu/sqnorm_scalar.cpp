// Column sums of squares without intrinsics. See sqnorm_impl.h.
#include "sqnorm.h"

#include "sqnorm_impl.h"

namespace wanda::cpu {

void sqnorm_scalar(const SqnormParams& params, int64_t sequence, int64_t begin, int64_t end) {
  sqnorm_run<SqnormLanesScalar>(params, sequence, begin, end);
}

}  // namespace wanda::cpu
