// Launchers of 2:4 packing and unpacking.
#include "pack_24.cuh"

#include "launchers.h"

namespace wanda::cuda {

int launch_pack_24(const Pack24Params& params, CUstream_st* stream) {
  const Shape shape{pack_24_grid(params.rows, params.cols), kPackThreads, 0};
  if (params.norm == nullptr) {  // only copies elements: any 16-bit type
    return launch(&pack_24_kernel<Dtype::kFloat16, false>, shape, stream, params);
  }
  if (params.dtype == Dtype::kFloat16) {
    return launch(&pack_24_kernel<Dtype::kFloat16, true>, shape, stream, params);
  }
  return launch(&pack_24_kernel<Dtype::kBFloat16, true>, shape, stream, params);
}

int launch_unpack_24(const Unpack24Params& params, CUstream_st* stream) {
  return launch(&unpack_24_kernel, {pack_24_grid(params.rows, params.cols), kPackThreads, 0}, stream, params);
}

}  // namespace wanda::cuda
