// Launcher of the column sums of squares.
#include "sqnorm.cuh"

#include "launchers.h"

namespace wanda::cuda {

int launch_sqnorm(const SqnormParams& params, int vector, CUstream_st* stream) {
  return by_dtype(params.dtype, [&](auto dtype) {
    constexpr Dtype kDtype = decltype(dtype)::value;
    const Shape shape = sqnorm_shape(params, vector);
    if (vector == 1) return launch(&sqnorm_columns_kernel<kDtype, 1>, shape, stream, params);
    return launch(&sqnorm_columns_kernel<kDtype, Element<kDtype>::kChunk>, shape, stream, params);
  });
}

}  // namespace wanda::cuda
