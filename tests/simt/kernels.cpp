// The shipped kernels with their launchers and plans behind plain C functions, for tests/test_simt.py.
// Instrumented: see simt.h.
#include "../../csrc/cuda/nm.cu"
#include "../../csrc/cuda/pack_24.cu"
#include "../../csrc/cuda/packed.cu"
#include "../../csrc/cuda/quantized.cu"
#include "../../csrc/cuda/refine.cu"
#include "../../csrc/cuda/rows.cu"
#include "../../csrc/cuda/sqnorm.cu"

using namespace wanda;
using namespace wanda::cuda;

extern "C" {

// The launchers' own plans; a test may change them.
void simt_plan_rows(const RowsParams* params, const Device* device, RowsPlan* plan) {
  *plan = plan_rows(*params, *device);
}
void simt_rows_plan(const RowsParams* params, int path, int quads, int halves, RowsPlan* plan) {
  *plan = rows_plan(*params, static_cast<RowsPath>(path), quads, halves);
}
void simt_plan_nm(const NmParams* params, const Device* device, NmPlan* plan) {
  *plan = plan_nm(*params, *device);
}
void simt_plan_refine(const RefineParams* params, const Device* device, RefinePlan* plan) {
  *plan = plan_refine(*params, *device);
}
void simt_refine_plan(const RefineParams* params, int place, int pairs, RefinePlan* plan) {
  *plan = refine_plan(*params, static_cast<RefinePlace>(place), pairs != 0);
}
void simt_plan_linear(const PackedLinearParams* params, const Device* device, LinearPlan* plan) {
  *plan = params->weight.starts != nullptr ? plan_bitmap_linear(params->weight, params->tokens, *device)
                                           : plan_sparse24_linear(params->weight, params->tokens, *device);
}
void simt_plan_experts(const PackedExpertsParams* params, const Device* device, LinearPlan* plan) {
  *plan = params->stack.starts != nullptr ? plan_bitmap_experts(*params, *device)
                                          : plan_sparse24_experts(*params);
}
void simt_plan_unpack(const PackedWeight* weight, const Device*, LinearPlan* plan) {
  *plan = plan_unpack_bitmap(*weight);
}
// `rows` of a block (0 tokens: unpacking), `slices` and warps are the test's.
void simt_linear_plan(const PackedWeight* weight, int64_t tokens, int rows, int slices, int warps,
                      LinearPlan* plan) {
  *plan = weight->starts != nullptr ? bitmap_plan(*weight, tokens, rows, warps)
                                    : sparse24_plan(*weight, tokens, rows, slices, warps);
}
// `room`: tokens at a time, 0 for the launcher's own; so are the `warps` at most.
void simt_plan_quantized(const QuantizedLinearParams* params, const Device* device, int room, int warps,
                         QuantizedPlan* plan) {
  *plan = room == 0 ? plan_quantized(*params, *device) : quantized_plan(params->weight, room, warps);
}
int simt_rows_grid(int64_t rows, int64_t matrices, int64_t resident) {
  return static_cast<int>(rows_grid(rows, matrices, resident));
}
int simt_sqnorm_vector(const SqnormParams* params) { return sqnorm_vector(*params); }

void simt_rows(const RowsParams* params, const RowsPlan* plan) { launch_rows(*params, *plan, nullptr); }
void simt_nm(const NmParams* params, const NmPlan* plan) { launch_nm(*params, *plan, nullptr); }
void simt_refine(const RefineParams* params, const RefinePlan* plan, double* c, double* errors,
                 const float* diagonal) {
  launch_refine(*params, *plan, c, errors, diagonal, nullptr);
}
void simt_pack_24(const Pack24Params* params) { launch_pack_24(*params, nullptr); }
void simt_unpack_24(const Unpack24Params* params) { launch_unpack_24(*params, nullptr); }
void simt_sqnorm(const SqnormParams* params, int vector) { launch_sqnorm(*params, vector, nullptr); }
void simt_bitmap_linear(const PackedLinearParams* params, const LinearPlan* plan) {
  launch_bitmap_linear(*params, *plan, nullptr);
}
void simt_sparse24_linear(const PackedLinearParams* params, const LinearPlan* plan) {
  launch_sparse24_linear(*params, *plan, nullptr);
}
void simt_bitmap_experts(const PackedExpertsParams* params, const LinearPlan* plan) {
  launch_bitmap_experts(*params, *plan, nullptr);
}
void simt_sparse24_experts(const PackedExpertsParams* params, const LinearPlan* plan) {
  launch_sparse24_experts(*params, *plan, nullptr);
}
void simt_unpack_bitmap(const PackedWeight* weight, void* dense, const LinearPlan* plan) {
  launch_unpack_bitmap(*weight, dense, *plan, nullptr);
}
void simt_unpack_sparse24(const PackedWeight* weight, void* dense) {
  launch_unpack_sparse24(*weight, dense, nullptr);
}

void simt_round(const RoundParams* params) { launch_round(*params, nullptr); }
void simt_quantized_linear(const QuantizedLinearParams* params, const QuantizedPlan* plan) {
  launch_quantized_linear(*params, *plan, nullptr);
}
void simt_unpack_quantized(const QuantizedWeight* weight, void* dense, int dtype, const QuantizedPlan* plan) {
  launch_unpack_quantized(*weight, dense, static_cast<Dtype>(dtype), *plan, nullptr);
}

}  // extern "C"
