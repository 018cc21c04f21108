// Launcher of N:M selection: picks the kernel for the pattern, the alignment and what is to be written.
#include "nm.cuh"
#include "nm_any.cuh"

#include <algorithm>

#include "launch.h"

namespace wanda::cuda {
namespace {

template <Dtype kDtype, int kM, int kKept, NmOutput kOutput>
cudaError_t launch(const NmParams& params, cudaStream_t stream) {
  // As many threads as leave the last pass over a row nearly full.
  const int64_t units = params.cols / NmUnit<kDtype, kM, kKept, kOutput>::kWidth;
  const int64_t passes = (units + 255) / 256;
  const int threads = static_cast<int>(((units + passes - 1) / passes + kWarp - 1) / kWarp * kWarp);
  constexpr int kRows = kNmRows<kM, kOutput>;
  const int bytes = kOutput == NmOutput::kPruneAndSum ? 2 * kRows * kWarp * sizeof(float) : 0;
  const int64_t grid = (params.rows + kRows - 1) / kRows;
  nm_kernel<kDtype, kM, kKept, kOutput><<<grid, threads, bytes, stream>>>(params);
  return cudaGetLastError();
}

template <Dtype kDtype, int kM, int kKept>
cudaError_t launch_output(const NmParams& params, cudaStream_t stream) {
  if (params.mask != nullptr) return launch<kDtype, kM, kKept, NmOutput::kMask>(params, stream);
  if (params.score_sums != nullptr) return launch<kDtype, kM, kKept, NmOutput::kPruneAndSum>(params, stream);
  return launch<kDtype, kM, kKept, NmOutput::kPrune>(params, stream);
}

template <Dtype kDtype>
cudaError_t launch_segments(const NmParams& params, int64_t grid, cudaStream_t stream) {
  const RowsParams rows{params.weight, params.norm,       params.mask,         params.score_sums, params.rows,
                        params.cols,   params.row_stride, params.m - params.n, params.dtype};
  const int threads = static_cast<int>(std::clamp<int64_t>((params.m + 31) / 32 * 32, 32, 512));
  rows_any_kernel<kDtype><<<grid, threads, sizeof(RowsAnyShared), stream>>>(rows, params.m);
  return cudaGetLastError();
}

template <Dtype kDtype, int kM>
cudaError_t launch_tiles(const NmParams& params, int64_t grid, cudaStream_t stream) {
  const int64_t groups = params.cols / params.m;
  const int threads = static_cast<int>(std::clamp<int64_t>((groups + 31) / 32 * 32, 32, kNmAnyThreads));
  nm_any_kernel<kDtype, kM><<<grid, threads, sizeof(NmAnyShared<kDtype, kM>), stream>>>(params);
  return cudaGetLastError();
}

template <Dtype kDtype>
cudaError_t launch_any(const NmParams& params, cudaStream_t stream) {
  Device device;
  const cudaError_t error = current_device(device);
  if (error != cudaSuccess) return error;
  const int64_t grid = std::min<int64_t>(params.rows, 16LL * device.processors);
  if (params.m <= 4) return launch_tiles<kDtype, 4>(params, grid, stream);
  if (params.m <= 8) return launch_tiles<kDtype, 8>(params, grid, stream);
  if (params.m <= 16) return launch_tiles<kDtype, 16>(params, grid, stream);
  if (params.m <= 32) return launch_tiles<kDtype, 32>(params, grid, stream);
  return launch_segments<kDtype>(params, grid, stream);
}

template <Dtype kDtype>
cudaError_t launch_dtype(const NmParams& params, cudaStream_t stream) {
  constexpr int64_t kBytes = sizeof(typename Element<kDtype>::Bits);
  const int64_t unit = std::max<int64_t>(params.m, params.mask == nullptr ? Element<kDtype>::kChunk : 16);
  const bool is_vector = is_aligned(params.weight) && is_aligned(params.norm) && is_aligned(params.mask) &&
                         params.row_stride * kBytes % 16 == 0 && params.cols % unit == 0;
  if (is_vector && params.m == 2) return launch_output<kDtype, 2, 0>(params, stream);
  if (is_vector && params.m == 4 && params.n == 1) return launch_output<kDtype, 4, 1>(params, stream);
  if (is_vector && params.m == 4 && params.n == 2) return launch_output<kDtype, 4, 2>(params, stream);
  if (is_vector && params.m == 4 && params.n == 3) return launch_output<kDtype, 4, 3>(params, stream);
  if (is_vector && params.m == 8 && params.n == 4) return launch_output<kDtype, 8, 4>(params, stream);
  if (is_vector && params.m == 8) return launch_output<kDtype, 8, 0>(params, stream);
  if (is_vector && params.m == 16) return launch_output<kDtype, 16, 0>(params, stream);
  if (is_vector && params.m == 32) return launch_output<kDtype, 32, 0>(params, stream);
  return launch_any<kDtype>(params, stream);
}

}  // namespace

int launch_nm(const NmParams& params, CUstream_st* stream) {
  if (params.rows == 0 || params.cols == 0) return cudaSuccess;
  return by_dtype(params.dtype,
                  [&](auto dtype) { return launch_dtype<decltype(dtype)::value>(params, stream); });
}

}  // namespace wanda::cuda
