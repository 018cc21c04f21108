// The launchers of the CUDA kernels. Each enqueues on `stream` and returns a cudaError_t, 0 on success.
// Torch-free.
#pragma once

#include "plan_quantized.h"

struct CUstream_st;

namespace wanda::cuda {

int launch_rows(const RowsParams& params, const RowsPlan& plan, CUstream_st* stream);
int launch_nm(const NmParams& params, const NmPlan& plan, CUstream_st* stream);
// `c`: [min(plan.band, rows), cols]; `errors`: as many rows; `diagonal`: [cols], of the Gram matrix.
int launch_refine(const RefineParams& params, const RefinePlan& plan, double* c, double* errors,
                  const float* diagonal, CUstream_st* stream);
int launch_pack_24(const Pack24Params& params, CUstream_st* stream);
int launch_unpack_24(const Unpack24Params& params, CUstream_st* stream);
int launch_sqnorm(const SqnormParams& params, int vector, CUstream_st* stream);

// At most kBitmapTokens or kSparse24Tokens tokens, the latter in 16-bit types.
int launch_bitmap_linear(const PackedLinearParams& params, const LinearPlan& plan, CUstream_st* stream);
int launch_sparse24_linear(const PackedLinearParams& params, const LinearPlan& plan, CUstream_st* stream);
// Any number of tokens. 2:4: in 16-bit types.
int launch_bitmap_experts(const PackedExpertsParams& params, const LinearPlan& plan, CUstream_st* stream);
int launch_sparse24_experts(const PackedExpertsParams& params, const LinearPlan& plan, CUstream_st* stream);
int launch_unpack_bitmap(const PackedWeight& weight, void* dense, const LinearPlan& plan,
                         CUstream_st* stream);
int launch_unpack_sparse24(const PackedWeight& weight, void* dense, CUstream_st* stream);

int launch_round(const RoundParams& params, CUstream_st* stream);
// Any number of tokens. `stream`: launch_round has been there.
int launch_quantized_linear(const QuantizedLinearParams& params, const QuantizedPlan& plan,
                            CUstream_st* stream);
int launch_unpack_quantized(const QuantizedWeight& weight, void* dense, Dtype dtype,
                            const QuantizedPlan& plan, CUstream_st* stream);

}  // namespace wanda::cuda
