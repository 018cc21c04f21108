// Launchers of products with packed weights and of unpacking.
#include "bitmap_linear.cuh"
#include "launchers.h"
#include "sparse24_linear.cuh"
#include "unpack_packed.cuh"

namespace wanda::cuda {
namespace {

template <Dtype kDtype, int kRows, int kBatch>
int launch_bitmap(const PackedLinearParams& params, const LinearPlan& plan, CUstream_st* stream) {
  const Shape shape{divide_up(params.weight.rows, kRows), plan.threads, bitmap_shared_bytes(plan, kDtype)};
  return launch(&bitmap_linear_kernel<kDtype, kRows, kBatch>, shape, stream, params, plan.stages);
}

template <Dtype kDtype, int kRows>
int launch_bitmap_room(const PackedLinearParams& params, const LinearPlan& plan, CUstream_st* stream) {
  if (plan.room == 1) return launch_bitmap<kDtype, kRows, 1>(params, plan, stream);
  if (plan.room == 2) return launch_bitmap<kDtype, kRows, 2>(params, plan, stream);
  if (plan.room == 4) return launch_bitmap<kDtype, kRows, 4>(params, plan, stream);
  return launch_bitmap<kDtype, kRows, 8>(params, plan, stream);
}

template <Dtype kDtype, int kRowTiles, int kRoom>
int launch_sparse24(const PackedLinearParams& params, const LinearPlan& plan, CUstream_st* stream) {
  const auto kernel = &sparse24_linear_kernel<kDtype, kRowTiles, kRoom>;
  const Shape shape{divide_up(params.weight.rows * plan.slices, plan.rows), plan.threads,
                    sparse24_shared_bytes(plan, static_cast<int>(params.tokens) * plan.slices)};
  const int error = allow_shared(kernel, shape.shared_bytes);
  if (error != 0) return error;
  return launch(kernel, shape, stream, params, plan.slices, plan.stages);
}

template <Dtype kDtype>
int launch_sparse24_room(const PackedLinearParams& params, const LinearPlan& plan, CUstream_st* stream) {
  const bool two = plan.rows == 32;
  if (plan.room == 2) return launch_sparse24<kDtype, 1, 2>(params, plan, stream);
  if (plan.room == 8) return launch_sparse24<kDtype, 1, 8>(params, plan, stream);
  if (plan.room == 16) {
    return two ? launch_sparse24<kDtype, 2, 16>(params, plan, stream)
               : launch_sparse24<kDtype, 1, 16>(params, plan, stream);
  }
  return two ? launch_sparse24<kDtype, 2, 32>(params, plan, stream)
             : launch_sparse24<kDtype, 1, 32>(params, plan, stream);
}

}  // namespace

int launch_bitmap_linear(const PackedLinearParams& params, const LinearPlan& plan, CUstream_st* stream) {
  return by_dtype(params.weight.dtype, [&](auto dtype) {
    constexpr Dtype kDtype = decltype(dtype)::value;
    return plan.rows == 2 ? launch_bitmap_room<kDtype, 2>(params, plan, stream)
                          : launch_bitmap_room<kDtype, 4>(params, plan, stream);
  });
}

int launch_sparse24_linear(const PackedLinearParams& params, const LinearPlan& plan, CUstream_st* stream) {
  if (params.weight.dtype == Dtype::kBFloat16) {
    return launch_sparse24_room<Dtype::kBFloat16>(params, plan, stream);
  }
  return launch_sparse24_room<Dtype::kFloat16>(params, plan, stream);
}

int launch_unpack_bitmap(const PackedWeight& weight, void* dense, const LinearPlan& plan,
                         CUstream_st* stream) {
  const Shape shape{weight.rows, plan.threads, bitmap_shared_bytes(plan, weight.dtype)};
  return by_dtype(weight.dtype, [&](auto dtype) {
    return launch(&unpack_bitmap_kernel<decltype(dtype)::value>, shape, stream, weight, dense, plan.stages);
  });
}

int launch_unpack_sparse24(const PackedWeight& weight, void* dense, CUstream_st* stream) {
  const Shape shape{divide_up(weight.rows * (weight.cols / 8), kUnpackThreads), kUnpackThreads, 0};
  return by_dtype(weight.dtype, [&](auto dtype) {
    return launch(&unpack_sparse24_kernel<decltype(dtype)::value>, shape, stream, weight, dense);
  });
}

}  // namespace wanda::cuda
