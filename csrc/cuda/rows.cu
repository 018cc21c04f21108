// Launcher of row selection: picks the kernel, its block shape and its shared memory.
#include "rows.cuh"

#include "launch.h"

#include <algorithm>
#include <cmath>

namespace wanda::cuda {
namespace {

constexpr int64_t kWidest = rows_threads(16) * 64;  // columns that a block holds in registers: 57,344
constexpr int64_t kNarrow = 2048;                   // up to here a thread holds 16 elements

// How far log2 of |normal|'s `share`-quantile lies above the mean of its buckets (-0.973): the k-th score of
// a plain Gaussian row. Winitzki's approximation of erf^-1, 0.2 % off: the kernel only starts from it.
float gaussian_distance(double share) {
  const double s = std::min(std::max(share, 1e-6), 1 - 1e-6);
  const double log = std::log(1 - s * s), half = 2 / (M_PI * 0.147) + log / 2;
  return static_cast<float>(std::log2(2 * (std::sqrt(half * half - log / 0.147) - half)) / 2 + 0.973);
}

constexpr int64_t warp_columns(int quads) { return int64_t{kWarp} * 4 * quads; }

// What a row of `cols` columns costs: SASS instructions of one thread (bf16, sm_90: 461 and 16 an element)
// times warps. 22 quads rather than 16 leave 11,008 columns 2 % idle instead of 10 %, and 5,120 8 % instead
// of 17 %.
constexpr int64_t warp_instructions(int quads, int64_t cols) {
  return (cols + warp_columns(quads) - 1) / warp_columns(quads) * (461 + 16 * 4 * quads);
}

template <Dtype kDtype>
cudaError_t launch_any(const RowsParams& params, const Device& device, cudaStream_t stream) {
  const int64_t grid = std::min<int64_t>(params.rows, 4LL * device.processors);
  const int threads = static_cast<int>(std::clamp<int64_t>((params.cols + 31) / 32 * 32, 32, 512));
  rows_any_kernel<kDtype><<<grid, threads, sizeof(RowsAnyShared), stream>>>(params, params.cols);
  return cudaGetLastError();
}

template <Dtype kDtype, int kQuads, RowsOutput kOutput, bool kStaged>
cudaError_t launch(const RowsParams& params, const Device& device, cudaStream_t stream) {
  constexpr int kElements = 4 * kQuads;
  const auto kernel = &rows_kernel<kDtype, kQuads, kOutput, kStaged>;
  const int threads = static_cast<int>((params.cols + 32 * kElements - 1) / (32 * kElements) * 32);
  const float half_width = 2.56f / std::sqrt(static_cast<float>(params.cols));
  RowsTuning tuning{gaussian_distance(static_cast<double>(params.k) / static_cast<double>(params.cols)),
                    half_width, std::max(half_width, 0.15f), 1.0f / static_cast<float>(params.cols),
                    kStaged ? 1 : 0};
  int64_t bytes = sizeof(RowsShared);
  if (kStaged) {
    // Two blocks and more on a processor hide each other's loads; a block alone loads its next row ahead.
    const int64_t stage_bytes = threads * int64_t{kElements} * sizeof(typename Element<kDtype>::Bits);
    if (threads > 512 && bytes + 2 * stage_bytes <= device.shared_bytes) tuning.stages = 2;
    bytes += tuning.stages * stage_bytes;
  }
  cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
  if (error != cudaSuccess) return error;
  int blocks = 0;
  error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, threads, bytes);
  if (error != cudaSuccess) return error;
  // Blocks that stay and take every grid-th row learn the distance; equal shares leave the shortest tail.
  const int64_t resident = std::max<int64_t>(1, int64_t{blocks} * device.processors);
  const int64_t rounds = (params.rows + resident - 1) / resident;
  const int64_t grid = (params.rows + rounds - 1) / rounds;
  kernel<<<grid, threads, bytes, stream>>>(params, tuning);
  return cudaGetLastError();
}

template <Dtype kDtype, int kQuads, RowsOutput kOutput>
cudaError_t launch_shape(const RowsParams& params, const Device& device, bool staged, cudaStream_t stream) {
  return staged ? launch<kDtype, kQuads, kOutput, true>(params, device, stream)
                : launch<kDtype, kQuads, kOutput, false>(params, device, stream);
}

template <Dtype kDtype, RowsOutput kOutput>
cudaError_t launch_output(const RowsParams& params, const Device& device, cudaStream_t stream) {
  if (params.cols > kWidest || params.k == params.cols) return launch_any<kDtype>(params, device, stream);
  constexpr int64_t kBytes = sizeof(typename Element<kDtype>::Bits);
  const bool staged =
      is_aligned(params.weight) && is_aligned(params.norm) && is_aligned(params.mask) &&
      params.row_stride * kBytes % 16 == 0 && params.cols * (params.mask == nullptr ? kBytes : 1) % 16 == 0 &&
      (params.cols + 2047) / 2048 * 2048 * kBytes + static_cast<int64_t>(sizeof(RowsShared)) <=
          device.shared_bytes;
  if (params.cols <= kNarrow) return launch_shape<kDtype, 4, kOutput>(params, device, staged, stream);
  if (staged && params.cols <= warp_columns(22) * rows_threads(22) / kWarp &&
      warp_instructions(22, params.cols) < warp_instructions(16, params.cols)) {
    return launch<kDtype, 22, kOutput, true>(params, device, stream);
  }
  return launch_shape<kDtype, 16, kOutput>(params, device, staged, stream);
}

template <Dtype kDtype>
cudaError_t launch_dtype(const RowsParams& params, const Device& device, cudaStream_t stream) {
  if (params.mask != nullptr) return launch_output<kDtype, RowsOutput::kMask>(params, device, stream);
  if (params.score_sums != nullptr) {
    return launch_output<kDtype, RowsOutput::kPruneAndSum>(params, device, stream);
  }
  return launch_output<kDtype, RowsOutput::kPrune>(params, device, stream);
}

}  // namespace

int launch_rows(const RowsParams& params, CUstream_st* stream) {
  if (params.rows == 0 || params.cols == 0) return cudaSuccess;
  Device device;
  const cudaError_t error = current_device(device);
  if (error != cudaSuccess) return error;
  return by_dtype(params.dtype,
                  [&](auto dtype) { return launch_dtype<decltype(dtype)::value>(params, device, stream); });
}

}  // namespace wanda::cuda
