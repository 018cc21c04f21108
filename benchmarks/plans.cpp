// csrc/cuda/plan.h for predict.py: what is launched for a shape, as plain numbers.
#include "../csrc/cuda/plan_quantized.h"

using namespace wanda;
using namespace wanda::cuda;

namespace {

// An aligned pointer that nobody follows.
template <class T>
T* somewhere() {
  return reinterpret_cast<T*>(uintptr_t{4096});
}

Device device_of(int64_t processors, int64_t shared) {
  return {static_cast<int>(processors), static_cast<int>(shared)};
}

// `counts`: how many are pruned, or are kept of how many.
template <class Params, class... Counts>
Params selection_of(int64_t rows, int64_t cols, int64_t dtype, int64_t sums, Counts... counts) {
  float* const score_sums = sums != 0 ? somewhere<float>() : nullptr;
  return {somewhere<void>(), somewhere<float>(),       nullptr, score_sums, rows, cols, cols, rows,
          counts...,         static_cast<Dtype>(dtype)};
}

PackedWeight weight_of(int64_t rows, int64_t cols) {
  return {somewhere<void>(), somewhere<uint8_t>(), nullptr, rows, cols, Dtype::kBFloat16};
}

}  // namespace

extern "C" {

// path (0: staged), quads, threads, halves of rows, shared bytes.
void plan_of_rows(int64_t rows, int64_t cols, int64_t dtype, int64_t sums, int64_t processors, int64_t shared,
                  int64_t* out) {
  const RowsParams params = selection_of<RowsParams>(rows, cols, dtype, sums, cols / 2);
  const RowsPlan plan = plan_rows(params, device_of(processors, shared));
  out[0] = static_cast<int64_t>(plan.path);
  out[1] = plan.quads;
  out[2] = plan.threads;
  out[3] = plan.tuning.halves;
  out[4] = rows_shared_bytes(plan, params.dtype);
}

// threads, grid.
void plan_of_nm(int64_t rows, int64_t cols, int64_t dtype, int64_t sums, int64_t processors, int64_t shared,
                int64_t* out) {
  const NmParams params = selection_of<NmParams>(rows, cols, dtype, sums, 2, 4);
  const NmPlan plan = plan_nm(params, device_of(processors, shared));
  out[0] = plan.threads;
  out[1] = plan.grid;
}

// place (0: staged), columns at once, threads, shared bytes.
void plan_of_refine(int64_t rows, int64_t cols, int64_t dtype, int64_t processors, int64_t shared,
                    int64_t* out) {
  const RefineParams params{somewhere<bool>(),
                            somewhere<void>(),
                            somewhere<float>(),
                            nullptr,
                            nullptr,
                            0.3,
                            rows,
                            cols,
                            cols / 16,
                            0,
                            0,
                            static_cast<Dtype>(dtype)};
  const RefinePlan plan = plan_refine(params, device_of(processors, shared));
  out[0] = static_cast<int64_t>(plan.place);
  out[1] = plan.width;
  out[2] = plan.threads;
  out[3] = refine_shared_bytes(plan.place, params);
}

// threads, shared bytes; rows, columns and depth of a tile.
void plan_of_refine_sums(int64_t* out) {
  out[0] = kProductThreads;
  out[1] = kProductSharedBytes;
  out[2] = kProductRows;
  out[3] = kProductCols;
  out[4] = kProductDepth;
}

// threads, grid.
void plan_of_pack_24(int64_t rows, int64_t cols, int64_t* out) {
  out[0] = kPackThreads;
  out[1] = pack_24_grid(rows, cols);
}

// threads, grid, rows and room of a block, stages, shared bytes.
void plan_of_bitmap(int64_t rows, int64_t cols, int64_t tokens, int64_t processors, int64_t shared,
                    int64_t* out) {
  const LinearPlan plan = plan_bitmap_linear(weight_of(rows, cols), tokens, device_of(processors, shared));
  out[0] = plan.threads;
  out[1] = divide_up(rows, plan.rows);
  out[2] = plan.rows;
  out[3] = plan.room;
  out[4] = plan.stages;
  out[5] = bitmap_shared_bytes(plan, Dtype::kBFloat16);
}

// threads, grid, rows and room of a block, slices, stages, shared bytes.
void plan_of_sparse24(int64_t rows, int64_t cols, int64_t tokens, int64_t processors, int64_t shared,
                      int64_t* out) {
  const LinearPlan plan = plan_sparse24_linear(weight_of(rows, cols), tokens, device_of(processors, shared));
  out[0] = plan.threads;
  out[1] = divide_up(rows * plan.slices, plan.rows);
  out[2] = plan.rows;
  out[3] = plan.room;
  out[4] = plan.slices;
  out[5] = plan.stages;
  out[6] = sparse24_shared_bytes(plan, static_cast<int>(tokens) * plan.slices);
}

// threads, grid, room of a block, share of a warp, shared bytes. `form`: as QuantizedForm; `group`: 0: of a
// row.
void plan_of_quantized(int64_t rows, int64_t cols, int64_t bits, int64_t group, int64_t form, int64_t tokens,
                       int64_t processors, int64_t shared, int64_t* out) {
  QuantizedLinearParams params{};
  params.weight = {somewhere<uint8_t>(),
                   somewhere<uint16_t>(),
                   form == 2 ? nullptr : somewhere<uint8_t>(),
                   form == 0 ? somewhere<int32_t>() : nullptr,
                   rows,
                   cols,
                   group != 0 ? group : cols,
                   group != 0 ? divide_up(cols, group) : 1,
                   bits};
  params.tokens = tokens;
  params.experts = 1;
  const QuantizedPlan plan = plan_quantized(params, device_of(processors, shared));
  out[0] = plan.threads;
  out[1] = divide_up(rows, kQuantizedRows);
  out[2] = plan.room;
  out[3] = plan.share;
  out[4] = quantized_shared_bytes(plan);
}

// threads, grid, shared bytes.
void plan_of_sqnorm(int64_t tokens, int64_t cols, int64_t* out) {
  const SqnormParams params{
      somewhere<float>(), somewhere<void>(), nullptr, nullptr, 1, tokens, cols, tokens * cols, cols, true,
      Dtype::kBFloat16};
  const Shape shape = sqnorm_shape(params, sqnorm_vector(params));
  out[0] = shape.threads;
  out[1] = shape.grid;
  out[2] = shape.shared_bytes;
}

}  // extern "C"
