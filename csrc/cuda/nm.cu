// Launcher of N:M selection.
#include "nm.cuh"

#include "launchers.h"
#include "nm_any.cuh"

namespace wanda::cuda {
namespace {

template <Dtype kDtype, int kM, int kKept>
int launch_nm_kernel(const NmParams& params, const NmPlan& plan, CUstream_st* stream) {
  Shape shape{plan.grid, plan.threads, 0, matrices_of(params)};
  const Output output = output_of(params);
  if (output == Output::kMask) {
    return launch(&nm_kernel<kDtype, kM, kKept, Output::kMask>, shape, stream, params);
  }
  if (output == Output::kPrune) {
    return launch(&nm_kernel<kDtype, kM, kKept, Output::kPrune>, shape, stream, params);
  }
  shape.shared_bytes = 2 * nm_rows(kM, output) * (plan.threads / kWarp) * sizeof(float);
  return launch(&nm_kernel<kDtype, kM, kKept, Output::kPruneAndSum>, shape, stream, params);
}

template <Dtype kDtype>
int launch_nm_vector(const NmParams& params, const NmPlan& plan, CUstream_st* stream) {
  if (params.m == 2) return launch_nm_kernel<kDtype, 2, 0>(params, plan, stream);
  if (params.m == 4 && plan.kept == 1) return launch_nm_kernel<kDtype, 4, 1>(params, plan, stream);
  if (params.m == 4 && plan.kept == 2) return launch_nm_kernel<kDtype, 4, 2>(params, plan, stream);
  if (params.m == 4) return launch_nm_kernel<kDtype, 4, 3>(params, plan, stream);
  if (params.m == 8 && plan.kept == 4) return launch_nm_kernel<kDtype, 8, 4>(params, plan, stream);
  if (params.m == 8) return launch_nm_kernel<kDtype, 8, 0>(params, plan, stream);
  if (params.m == 16) return launch_nm_kernel<kDtype, 16, 0>(params, plan, stream);
  return launch_nm_kernel<kDtype, 32, 0>(params, plan, stream);
}

template <Dtype kDtype, int kM>
int launch_nm_tiles(const NmParams& params, const NmPlan& plan, CUstream_st* stream) {
  const Shape shape{plan.grid, plan.threads, sizeof(NmAnyShared<kDtype, kM>), matrices_of(params)};
  return launch(&nm_any_kernel<kDtype, kM>, shape, stream, params);
}

}  // namespace

int launch_nm(const NmParams& params, const NmPlan& plan, CUstream_st* stream) {
  return by_dtype(params.dtype, [&](auto dtype) {
    constexpr Dtype kDtype = decltype(dtype)::value;
    if (plan.path == NmPath::kVector) return launch_nm_vector<kDtype>(params, plan, stream);
    if (plan.path == NmPath::kTiles) {
      if (params.m <= 4) return launch_nm_tiles<kDtype, 4>(params, plan, stream);
      if (params.m <= 8) return launch_nm_tiles<kDtype, 8>(params, plan, stream);
      if (params.m <= 16) return launch_nm_tiles<kDtype, 16>(params, plan, stream);
      return launch_nm_tiles<kDtype, 32>(params, plan, stream);
    }
    const RowsParams rows{params.weight,       params.norm, params.mask,       params.score_sums,
                          params.rows,         params.cols, params.row_stride, params.norm_rows,
                          params.m - params.n, params.dtype};
    const Shape shape{plan.grid, plan.threads, sizeof(RowsAnyShared), matrices_of(params)};
    return launch(&rows_any_kernel<kDtype>, shape, stream, rows, params.m);
  });
}

}  // namespace wanda::cuda
