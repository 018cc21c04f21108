// What the CUDA bindings share: the current stream, the launch check, rows that the kernels can walk.
#pragma once

#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "../checks.h"

namespace wanda::cuda {

inline void check_launch(const char* op, int error) {
  TORCH_CHECK(error == 0, "wanda::", op,
              ": the launch failed: ", cudaGetErrorString(static_cast<cudaError_t>(error)));
}

// A matrix of one row may have any row stride; the kernels look at it for alignment.
inline int64_t row_stride(const at::Tensor& matrix) {
  return matrix.size(0) > 1 ? matrix.stride(0) : matrix.size(1);
}

inline bool is_aligned(const at::Tensor& tensor) {
  return reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % 16 == 0;
}

// For kernels that have no path for other alignments: such a view is copied.
inline at::Tensor aligned(const at::Tensor& tensor) {
  const at::Tensor plain = tensor.contiguous();
  return is_aligned(plain) ? plain : plain.clone();
}

}  // namespace wanda::cuda
