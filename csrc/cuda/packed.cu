// Launchers of products with packed weights and of unpacking.
#include "bitmap_linear.cuh"
#include "launchers.h"
#include "sparse24_linear.cuh"
#include "unpack_packed.cuh"

namespace wanda::cuda {
namespace {

template <Dtype kDtype, int kBatch>
int launch_bitmap(const PackedLinearParams& params, const LinearPlan& plan, CUstream_st* stream) {
  const Shape shape{divide_up(params.weight.rows, kBitmapLinearRows), plan.threads,
                    sizeof(BitmapLinearShared<kBatch>)};
  return launch(&bitmap_linear_kernel<kDtype, kBatch>, shape, stream, params);
}

template <Dtype kDtype, int kRowTiles, int kTokenTiles>
int launch_sparse24(const PackedLinearParams& params, const LinearPlan& plan, CUstream_st* stream) {
  const Shape shape{divide_up(params.weight.rows, 16 * kRowTiles), plan.threads,
                    sparse24_shared_bytes(kRowTiles, kTokenTiles, plan.threads / kWarp)};
  return launch(&sparse24_linear_kernel<kDtype, kRowTiles, kTokenTiles>, shape, stream, params);
}

template <Dtype kDtype, int kRowTiles>
int launch_sparse24_tokens(const PackedLinearParams& params, const LinearPlan& plan, CUstream_st* stream) {
  if (plan.token_tiles == 1) return launch_sparse24<kDtype, kRowTiles, 1>(params, plan, stream);
  if (plan.token_tiles == 2) return launch_sparse24<kDtype, kRowTiles, 2>(params, plan, stream);
  return launch_sparse24<kDtype, kRowTiles, 4>(params, plan, stream);
}

template <Dtype kDtype>
int launch_sparse24_rows(const PackedLinearParams& params, const LinearPlan& plan, CUstream_st* stream) {
  if (plan.row_tiles == 2) return launch_sparse24_tokens<kDtype, 2>(params, plan, stream);
  return launch_sparse24_tokens<kDtype, 1>(params, plan, stream);
}

}  // namespace

int launch_bitmap_linear(const PackedLinearParams& params, const LinearPlan& plan, CUstream_st* stream) {
  return by_dtype(params.weight.dtype, [&](auto dtype) {
    constexpr Dtype kDtype = decltype(dtype)::value;
    if (plan.token_tiles == 1) return launch_bitmap<kDtype, 1>(params, plan, stream);
    if (plan.token_tiles == 2) return launch_bitmap<kDtype, 2>(params, plan, stream);
    if (plan.token_tiles == 4) return launch_bitmap<kDtype, 4>(params, plan, stream);
    return launch_bitmap<kDtype, 8>(params, plan, stream);
  });
}

int launch_sparse24_linear(const PackedLinearParams& params, const LinearPlan& plan, CUstream_st* stream) {
  if (params.weight.dtype == Dtype::kBFloat16) {
    return launch_sparse24_rows<Dtype::kBFloat16>(params, plan, stream);
  }
  return launch_sparse24_rows<Dtype::kFloat16>(params, plan, stream);
}

int launch_unpack_bitmap(const PackedWeight& weight, void* dense, int threads, CUstream_st* stream) {
  const Shape shape{weight.rows, threads, sizeof(BitmapShared<1>)};
  return by_dtype(weight.dtype, [&](auto dtype) {
    return launch(&unpack_bitmap_kernel<decltype(dtype)::value>, shape, stream, weight, dense);
  });
}

int launch_unpack_sparse24(const PackedWeight& weight, void* dense, CUstream_st* stream) {
  const Shape shape{divide_up(weight.rows * (weight.cols / 8), kUnpackThreads), kUnpackThreads, 0};
  return by_dtype(weight.dtype, [&](auto dtype) {
    return launch(&unpack_sparse24_kernel<decltype(dtype)::value>, shape, stream, weight, dense);
  });
}

}  // namespace wanda::cuda
