// What the launchers ask of the device and of pointers.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "../common/dtype.h"

namespace wanda::cuda {

struct Device {
  int processors = 0;
  int shared_bytes = 0;  // that a block may have
};

inline cudaError_t current_device(Device& device) {
  int index = 0;
  cudaError_t error = cudaGetDevice(&index);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&device.processors, cudaDevAttrMultiProcessorCount, index);
  }
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&device.shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, index);
  }
  return error;
}

inline bool is_aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

}  // namespace wanda::cuda
