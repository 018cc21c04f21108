// Launcher of row selection.
#include "rows.cuh"

#include "launchers.h"

namespace wanda::cuda {
namespace {

template <Dtype kDtype, int kQuads, Output kOutput, bool kStaged>
int launch_rows_kernel(const RowsParams& params, const RowsPlan& plan, CUstream_st* stream) {
  const auto kernel = &rows_kernel<kDtype, kQuads, kOutput, kStaged>;
  Shape shape{plan.grid, plan.threads, rows_shared_bytes(plan, params.dtype), matrices_of(params)};
  int64_t resident = 0;
  const int error = resident_blocks(kernel, shape, resident);
  if (error != 0) return error;
  if (shape.grid == 0) shape.grid = rows_grid(params.norm_rows, shape.matrices, resident);
  return launch(kernel, shape, stream, params, plan.tuning);
}

template <Dtype kDtype, Output kOutput>
int launch_rows_output(const RowsParams& params, const RowsPlan& plan, CUstream_st* stream) {
  if (plan.path == RowsPath::kStaged) {
    if (plan.quads == 4) return launch_rows_kernel<kDtype, 4, kOutput, true>(params, plan, stream);
    if (plan.quads == 22) return launch_rows_kernel<kDtype, 22, kOutput, true>(params, plan, stream);
    return launch_rows_kernel<kDtype, 16, kOutput, true>(params, plan, stream);
  }
  if (plan.quads == 4) return launch_rows_kernel<kDtype, 4, kOutput, false>(params, plan, stream);
  return launch_rows_kernel<kDtype, 16, kOutput, false>(params, plan, stream);
}

}  // namespace

int launch_rows(const RowsParams& params, const RowsPlan& plan, CUstream_st* stream) {
  return by_dtype(params.dtype, [&](auto dtype) {
    constexpr Dtype kDtype = decltype(dtype)::value;
    if (plan.path == RowsPath::kAny) {
      const Shape shape{plan.grid, plan.threads, sizeof(RowsAnyShared), matrices_of(params)};
      return launch(&rows_any_kernel<kDtype>, shape, stream, params, params.cols);
    }
    const Output output = output_of(params);
    if (output == Output::kMask) return launch_rows_output<kDtype, Output::kMask>(params, plan, stream);
    if (output == Output::kPrune) return launch_rows_output<kDtype, Output::kPrune>(params, plan, stream);
    return launch_rows_output<kDtype, Output::kPruneAndSum>(params, plan, stream);
  });
}

}  // namespace wanda::cuda
