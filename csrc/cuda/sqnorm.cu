// Launcher of the column sums of squares.
#include "sqnorm.cuh"

#include "launch.h"

namespace wanda::cuda {
namespace {

template <Dtype kDtype, int kVector>
cudaError_t launch(const SqnormParams& params, cudaStream_t stream) {
  constexpr int64_t kTile = kWarp * kVector;
  const int64_t grid = (params.cols + kTile - 1) / kTile * params.sequences * sqnorm_chunks(params.tokens);
  sqnorm_partial_kernel<kDtype, kVector>
      <<<grid, kSqnormWarps * kWarp, sqnorm_shared_bytes(kVector), stream>>>(params);
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) return error;
  const int64_t columns = params.cols * (params.is_shared ? 1 : params.sequences);
  sqnorm_total_kernel<<<(columns + 255) / 256, 256, 0, stream>>>(params);
  return cudaGetLastError();
}

template <Dtype kDtype>
cudaError_t launch_dtype(const SqnormParams& params, cudaStream_t stream) {
  constexpr int kChunk = Element<kDtype>::kChunk;
  const bool is_vector = is_aligned(params.x) && params.cols % kChunk == 0 &&
                         params.token_stride % kChunk == 0 && params.sequence_stride % kChunk == 0;
  return is_vector ? launch<kDtype, kChunk>(params, stream) : launch<kDtype, 1>(params, stream);
}

}  // namespace

int launch_sqnorm(const SqnormParams& params, CUstream_st* stream) {
  if (params.sequences == 0 || params.tokens == 0 || params.cols == 0) return cudaSuccess;
  return by_dtype(params.dtype,
                  [&](auto dtype) { return launch_dtype<decltype(dtype)::value>(params, stream); });
}

}  // namespace wanda::cuda
