// Launchers of 2:4 packing and unpacking.
#include "pack_24.cuh"

namespace wanda::cuda {
namespace {

int64_t blocks_for(int64_t rows, int64_t cols) {
  const int64_t warps = rows / 32 * ((cols + 127) / 128);
  return (warps * kWarp + kPackThreads - 1) / kPackThreads;
}

}  // namespace

int launch_pack_24(const Pack24Params& params, CUstream_st* stream) {
  const int64_t grid = blocks_for(params.rows, params.cols);
  if (grid == 0) return cudaSuccess;
  if (params.norm == nullptr) {  // only copies elements: any 16-bit type
    pack_24_kernel<Dtype::kFloat16, false><<<grid, kPackThreads, 0, stream>>>(params);
  } else if (params.dtype == Dtype::kFloat16) {
    pack_24_kernel<Dtype::kFloat16, true><<<grid, kPackThreads, 0, stream>>>(params);
  } else {
    pack_24_kernel<Dtype::kBFloat16, true><<<grid, kPackThreads, 0, stream>>>(params);
  }
  return cudaGetLastError();
}

int launch_unpack_24(const Unpack24Params& params, CUstream_st* stream) {
  const int64_t grid = blocks_for(params.rows, params.cols);
  if (grid == 0) return cudaSuccess;
  unpack_24_kernel<<<grid, kPackThreads, 0, stream>>>(params);
  return cudaGetLastError();
}

}  // namespace wanda::cuda
