// Products and their column sums of squares with AVX2. See product_sqnorm_impl.h.
#include "product_sqnorm.h"

#if defined(__x86_64__)

#include <cstdint>
#include <cstring>

#include "convert.h"
#include "target_avx2_begin.h"

#include "product_sqnorm_impl.h"

namespace wanda::cpu {

void product_sqnorm_avx2(const ProductSqnormParams& params, int64_t sequence, int64_t begin, int64_t end) {
  product_sqnorm_run(params, sequence, begin, end);
}

}  // namespace wanda::cpu

#include "target_end.h"

#else

namespace wanda::cpu {

void product_sqnorm_avx2(const ProductSqnormParams& params, int64_t sequence, int64_t begin, int64_t end) {
  product_sqnorm_scalar(params, sequence, begin, end);
}

}  // namespace wanda::cpu

#endif
