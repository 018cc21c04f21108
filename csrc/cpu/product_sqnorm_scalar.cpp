// Products and their column sums of squares without a target pragma. See product_sqnorm_impl.h.
#include "product_sqnorm_impl.h"

namespace wanda::cpu {

void product_sqnorm_scalar(const ProductSqnormParams& params, int64_t sequence, int64_t begin, int64_t end) {
  product_sqnorm_run(params, sequence, begin, end);
}

}  // namespace wanda::cpu
