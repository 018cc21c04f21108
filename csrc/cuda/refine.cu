// Launcher of refinement by swaps.
#include "refine.cuh"

#include "launchers.h"

namespace wanda::cuda {
namespace {

template <Dtype kDtype, int kWidth, bool kStaged, bool kGroups>
int launch_swaps(const RefineParams& params, const RefineBand& band, const RefinePlan& plan,
                 CUstream_st* stream) {
  const auto kernel = &refine_kernel<kDtype, kWidth, kStaged, kGroups>;
  const Shape shape{band.rows, plan.threads, refine_shared_bytes(plan.place, params)};
  const int error = allow_shared(kernel, shape.shared_bytes);
  return error != 0 ? error : launch(kernel, shape, stream, params, band, plan);
}

template <Dtype kDtype, int kWidth>
int launch_swaps_of_width(const RefineParams& params, const RefineBand& band, const RefinePlan& plan,
                          CUstream_st* stream) {
  const bool is_staged = plan.place == RefinePlace::kStaged;
  if (params.m > 0) {
    return is_staged ? launch_swaps<kDtype, kWidth, true, true>(params, band, plan, stream)
                     : launch_swaps<kDtype, kWidth, false, true>(params, band, plan, stream);
  }
  return is_staged ? launch_swaps<kDtype, kWidth, true, false>(params, band, plan, stream)
                   : launch_swaps<kDtype, kWidth, false, false>(params, band, plan, stream);
}

template <Dtype kDtype>
int launch_band(const RefineParams& params, RefineBand band, const RefinePlan& plan, CUstream_st* stream) {
  const Shape products{divide_up(band.rows, kProductRows), kProductThreads, kProductSharedBytes,
                       divide_up(params.cols, kProductCols)};
  const Shape errors{divide_up(band.rows, kErrorRows), kErrorThreads, kErrorSharedBytes};
  int error = params.cols == 0 ? 0 : launch(&refine_products_kernel<kDtype>, products, stream, params, band);
  if (error == 0) error = launch(&refine_errors_kernel<kDtype>, errors, stream, params, band);
  if (error == 0) {
    error = plan.width == 2 ? launch_swaps_of_width<kDtype, 2>(params, band, plan, stream)
                            : launch_swaps_of_width<kDtype, 1>(params, band, plan, stream);
  }
  if (error != 0 || params.sums == nullptr) return error;
  ++band.errors;
  return launch(&refine_errors_kernel<kDtype>, errors, stream, params, band);
}

}  // namespace

int launch_refine(const RefineParams& params, const RefinePlan& plan, double* c, double* errors,
                  const float* diagonal, CUstream_st* stream) {
  for (int64_t first = 0; first < params.rows; first += plan.band) {
    RefineBand band{c, diagonal, errors, 1, first, std::min(plan.band, params.rows - first)};
    if (params.sums != nullptr) {
      band.errors = params.sums + 2 * first;
      band.error_stride = 2;
    }
    const int error = by_dtype(params.dtype, [&](auto dtype) {
      return launch_band<decltype(dtype)::value>(params, band, plan, stream);
    });
    if (error != 0) return error;
  }
  return 0;
}

}  // namespace wanda::cuda
