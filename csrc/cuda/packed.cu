// Launchers of products with packed weights and of unpacking.
#include <type_traits>

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

// f(Constant) of the plan's room, one of these.
template <int kRoom, int... kRooms, class F>
int by_room(int room, F f) {
  if constexpr (sizeof...(kRooms) > 0) {
    if (room != kRoom) return by_room<kRooms...>(room, f);
  }
  return f(std::integral_constant<int, kRoom>());
}

template <Dtype kDtype, int kRows>
int launch_bitmap_experts_rows(const PackedExpertsParams& params, const LinearPlan& plan,
                               CUstream_st* stream) {
  const int64_t blocks = divide_up(params.stack.rows / params.experts, kRows);
  const Shape shape{params.experts * blocks, plan.threads, bitmap_shared_bytes(plan, kDtype)};
  return by_room<1, 2, 4, 8>(plan.room, [&](auto room) {
    return launch(&bitmap_experts_kernel<kDtype, kRows, decltype(room)::value>, shape, stream, params,
                  static_cast<uint32_t>(blocks), plan.stages);
  });
}

template <Dtype kDtype>
int launch_sparse24_experts_room(const PackedExpertsParams& params, const LinearPlan& plan,
                                 CUstream_st* stream) {
  const int64_t blocks = divide_up(params.stack.rows / params.experts, plan.rows);
  const Shape shape{params.experts * blocks, plan.threads, sparse24_shared_bytes(plan, plan.room)};
  return by_room<2, 8, 16, 32>(plan.room, [&](auto room) {
    const auto kernel = &sparse24_experts_kernel<kDtype, decltype(room)::value>;
    const int error = allow_shared(kernel, shape.shared_bytes);
    if (error != 0) return error;
    return launch(kernel, shape, stream, params, static_cast<uint32_t>(blocks), plan.stages);
  });
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

int launch_bitmap_experts(const PackedExpertsParams& params, const LinearPlan& plan, CUstream_st* stream) {
  return by_dtype(params.stack.dtype, [&](auto dtype) {
    constexpr Dtype kDtype = decltype(dtype)::value;
    return plan.rows == 2 ? launch_bitmap_experts_rows<kDtype, 2>(params, plan, stream)
                          : launch_bitmap_experts_rows<kDtype, 4>(params, plan, stream);
  });
}

int launch_sparse24_experts(const PackedExpertsParams& params, const LinearPlan& plan, CUstream_st* stream) {
  if (params.stack.dtype == Dtype::kBFloat16) {
    return launch_sparse24_experts_room<Dtype::kBFloat16>(params, plan, stream);
  }
  return launch_sparse24_experts_room<Dtype::kFloat16>(params, plan, stream);
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
