// Launchers of products with packed weights and of unpacking.
#include "packed.h"

#include <algorithm>

#include "bitmap_linear.cuh"
#include "launch.h"
#include "sparse24_linear.cuh"
#include "unpack_packed.cuh"

namespace wanda::cuda {
namespace {

// As many warps as leave the last round over a row nearly full.
int bitmap_threads(int64_t cols) {
  const int64_t pieces = (cols + kPieceCols - 1) / kPieceCols,
                rounds = (pieces + kBitmapWarps - 1) / kBitmapWarps;
  return static_cast<int>((pieces + rounds - 1) / rounds * kWarp);
}

template <Dtype kDtype, int kBatch>
cudaError_t launch_bitmap(const PackedLinearParams& params, cudaStream_t stream) {
  const int64_t grid = (params.weight.rows + kBitmapLinearRows - 1) / kBitmapLinearRows;
  bitmap_linear_kernel<kDtype, kBatch>
      <<<grid, bitmap_threads(params.weight.cols), sizeof(BitmapLinearShared<kBatch>), stream>>>(params);
  return cudaGetLastError();
}

template <Dtype kDtype>
cudaError_t launch_bitmap_batch(const PackedLinearParams& params, cudaStream_t stream) {
  if (params.tokens == 1) return launch_bitmap<kDtype, 1>(params, stream);
  if (params.tokens == 2) return launch_bitmap<kDtype, 2>(params, stream);
  if (params.tokens <= 4) return launch_bitmap<kDtype, 4>(params, stream);
  return launch_bitmap<kDtype, 8>(params, stream);
}

template <Dtype kDtype, int kRowTiles, int kTokenTiles>
cudaError_t launch_sparse24(const PackedLinearParams& params, cudaStream_t stream) {
  const int64_t grid = (params.weight.rows + 16 * kRowTiles - 1) / (16 * kRowTiles);
  const int warps = static_cast<int>(std::min<int64_t>(kSparse24Warps, params.weight.cols / 64));
  const int bytes = sparse24_shared_bytes(kRowTiles, kTokenTiles, warps);
  sparse24_linear_kernel<kDtype, kRowTiles, kTokenTiles><<<grid, warps * kWarp, bytes, stream>>>(params);
  return cudaGetLastError();
}

template <Dtype kDtype, int kRowTiles>
cudaError_t launch_sparse24_tokens(const PackedLinearParams& params, cudaStream_t stream) {
  if (params.tokens <= 8) return launch_sparse24<kDtype, kRowTiles, 1>(params, stream);
  if (params.tokens <= 16) return launch_sparse24<kDtype, kRowTiles, 2>(params, stream);
  return launch_sparse24<kDtype, kRowTiles, 4>(params, stream);
}

// 32 rows a block halve the loads of x; where that leaves processors without a block, 16.
template <Dtype kDtype>
cudaError_t launch_sparse24_rows(const PackedLinearParams& params, cudaStream_t stream) {
  Device device;
  const cudaError_t error = current_device(device);
  if (error != cudaSuccess) return error;
  if (params.weight.rows >= 32LL * device.processors)
    return launch_sparse24_tokens<kDtype, 2>(params, stream);
  return launch_sparse24_tokens<kDtype, 1>(params, stream);
}

template <Dtype kDtype>
cudaError_t unpack_bitmap(const PackedWeight& weight, void* dense, cudaStream_t stream) {
  unpack_bitmap_kernel<kDtype>
      <<<weight.rows, bitmap_threads(weight.cols), sizeof(BitmapShared<1>), stream>>>(weight, dense);
  return cudaGetLastError();
}

template <Dtype kDtype>
cudaError_t unpack_sparse24(const PackedWeight& weight, void* dense, cudaStream_t stream) {
  const int64_t grid = (weight.rows * (weight.cols / 8) + 255) / 256;
  unpack_sparse24_kernel<kDtype><<<grid, 256, 0, stream>>>(weight, dense);
  return cudaGetLastError();
}

}  // namespace

int launch_bitmap_linear(const PackedLinearParams& params, CUstream_st* stream) {
  if (params.tokens == 0) return cudaSuccess;
  return by_dtype(params.weight.dtype,
                  [&](auto dtype) { return launch_bitmap_batch<decltype(dtype)::value>(params, stream); });
}

int launch_sparse24_linear(const PackedLinearParams& params, CUstream_st* stream) {
  if (params.tokens == 0) return cudaSuccess;
  if (params.weight.dtype == Dtype::kBFloat16) return launch_sparse24_rows<Dtype::kBFloat16>(params, stream);
  if (params.weight.dtype == Dtype::kFloat16) return launch_sparse24_rows<Dtype::kFloat16>(params, stream);
  return cudaErrorInvalidValue;
}

int launch_unpack_bitmap(const PackedWeight& weight, void* dense, CUstream_st* stream) {
  return by_dtype(weight.dtype,
                  [&](auto dtype) { return unpack_bitmap<decltype(dtype)::value>(weight, dense, stream); });
}

int launch_unpack_sparse24(const PackedWeight& weight, void* dense, CUstream_st* stream) {
  return by_dtype(weight.dtype,
                  [&](auto dtype) { return unpack_sparse24<decltype(dtype)::value>(weight, dense, stream); });
}

}  // namespace wanda::cuda
