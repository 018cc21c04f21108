// What the kernels and their launchers need of the compiler and of the device, in one place. nvcc takes it
// from the CUDA toolkit; any other compiler takes `simt.h` from its include path, which runs each CUDA thread
// as a fiber on the CPU (tests/simt). The kernel headers themselves are the same text for both.
#pragma once

#include <cstdint>

#include "plan.h"

#if defined(__CUDACC__)
#include <cuda_runtime.h>

#define WANDA_DEVICE __device__ __forceinline__
#define WANDA_DYNAMIC_SHARED(name) extern __shared__ __align__(16) unsigned char name[]

namespace wanda::cuda {

// A place in shared memory, made once: the compiler, which knows where shared memory begins, would add that
// up again for each access.
using SharedAddress = uint32_t;
WANDA_DEVICE SharedAddress shared_address(const void* shared) {
  SharedAddress address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("" : "+r"(address));
  return address;
}
template <class T>
WANDA_DEVICE T load_shared(SharedAddress from) {
  T value;
  if constexpr (sizeof(T) == 2) {
    asm volatile("ld.shared.u16 %0, [%1];" : "=h"(value) : "r"(from) : "memory");
  } else if constexpr (sizeof(T) == 4) {
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(value) : "r"(from) : "memory");
  } else {
    asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(value.x), "=r"(value.y) : "r"(from) : "memory");
  }
  return value;
}

WANDA_DEVICE void store_shared(SharedAddress to, uint32_t a, uint32_t b) {
  asm volatile("st.shared.v2.u32 [%0], {%1, %2};" ::"r"(to), "r"(a), "r"(b) : "memory");
}

// 16 or 8 bytes from global to shared memory without passing through registers.
WANDA_DEVICE void copy_async_16(SharedAddress to, const void* global) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(global) : "memory");
}
// Zeros where there are none.
WANDA_DEVICE void copy_async_16(void* shared, const void* global, bool is_there) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(global),
               "r"(is_there ? 16 : 0)
               : "memory");
}
WANDA_DEVICE void copy_async_8(SharedAddress to, const void* global) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8;" ::"r"(to), "l"(global) : "memory");
}
WANDA_DEVICE void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most kPending of this thread's groups are still on their way.
template <int kPending>
WANDA_DEVICE void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// The same value, about which the compiler knows nothing: what is computed from it is not kept from one loop
// or phase to the next in registers that the kernel has better uses for.
WANDA_DEVICE uint32_t opaque(uint32_t value) {
  asm volatile("" : "+r"(value));
  return value;
}

WANDA_DEVICE int64_t opaque_64(int64_t value) {
  asm volatile("" : "+l"(value));
  return value;
}

template <class T>
WANDA_DEVICE const T* opaque(const T* pointer) {
  asm volatile("" : "+l"(pointer));
  return pointer;
}

// Each nibble of the selector picks one of the eight bytes of high:low; with its top bit set, the picked
// byte's top bit fills the result's byte (__byte_perm cannot do that).
WANDA_DEVICE uint32_t permute_bytes(uint32_t low, uint32_t high, uint32_t selector) {
  uint32_t result;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(result) : "r"(low), "r"(high), "r"(selector));
  return result;
}

template <uint32_t kSelector>
WANDA_DEVICE uint32_t permute_bytes(uint32_t low, uint32_t high) {
  uint32_t result;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(result) : "r"(low), "r"(high), "n"(kSelector));
  return result;
}

// One 128-bit access each. nvcc 13.0 made four stores of an assigned uint4.
WANDA_DEVICE uint4 load_16(const void* from) { return *static_cast<const uint4*>(from); }
WANDA_DEVICE void store_16(void* to /* global */, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(a), "r"(b), "r"(c), "r"(d)
               : "memory");
}

// Four 8 x 8 matrices of 16-bit elements from shared memory: lane i names row i % 8 of matrix i / 8, and gets
// of each matrix elements 2 * (i % 4) and the next of row i / 4.
WANDA_DEVICE void load_matrices(SharedAddress row, uint32_t (&part)[4]) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(part[0]), "=r"(part[1]), "=r"(part[2]), "=r"(part[3])
               : "r"(row)
               : "memory");
}

WANDA_DEVICE float half_to_float(uint16_t bits) {
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
  return value;
}

// To nearest even.
WANDA_DEVICE uint16_t float_to_half(float value) {
  uint16_t bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
  return bits;
}
WANDA_DEVICE uint16_t float_to_bfloat16(float value) {
  uint16_t bits;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(value));
  return bits;
}

// sum [16 x 8] += A [16 x 16] B [16 x 8]: fragments as in the PTX ISA, mma m16n8k16.
template <bool kIsBFloat16>
WANDA_DEVICE void mma(float (&sum)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  if constexpr (kIsBFloat16) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
}

// sum [16 x 8] += A [16 x 32, 2:4] B [32 x 8]: fragments as in the PTX ISA, mma.sp m16n8k32. `metadata`
// counts in lanes 2 * kSelector and 2 * kSelector + 1 of each quad.
template <bool kIsBFloat16, int kSelector>
WANDA_DEVICE void mma_sparse(float (&sum)[4], const uint32_t (&a)[4], const uint32_t (&b)[4],
                             uint32_t metadata) {
  if constexpr (kIsBFloat16) {
    asm volatile(
        "mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, "
        "{%4, %5, %6, %7}, {%8, %9, %10, %11}, {%0, %1, %2, %3}, %12, %13;"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(b[2]), "r"(b[3]),
          "r"(metadata), "n"(kSelector));
  } else {
    asm volatile(
        "mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, "
        "{%4, %5, %6, %7}, {%8, %9, %10, %11}, {%0, %1, %2, %3}, %12, %13;"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(b[2]), "r"(b[3]),
          "r"(metadata), "n"(kSelector));
  }
}

template <class Kernel, class... Arguments>
int launch(Kernel* kernel, const Shape& shape, CUstream_st* stream, const Arguments&... arguments) {
  const dim3 grid(shape.grid, shape.matrices);
  kernel<<<grid, shape.threads, shape.shared_bytes, stream>>>(arguments...);
  return cudaGetLastError();
}

// Lets the kernel have as much shared memory as there is, where `bytes` are more than it has unasked: the
// same for each launch, since another thread may launch it too.
template <class Kernel>
int allow_shared(Kernel* kernel, int64_t bytes) {
  if (bytes <= 48 << 10) return cudaSuccess;
  int device = 0, most = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  }
  if (error == cudaSuccess) {
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most);
  }
  return error;
}

// How many blocks of that shape the device holds at once, with as much shared memory as they ask for.
template <class Kernel>
int resident_blocks(Kernel* kernel, const Shape& shape, int64_t& blocks) {
  int device = 0, processors = 0, on_one = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  }
  if (error == cudaSuccess) error = static_cast<cudaError_t>(allow_shared(kernel, shape.shared_bytes));
  if (error == cudaSuccess) {
    error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&on_one, kernel, static_cast<int>(shape.threads),
                                                          shape.shared_bytes);
  }
  blocks = int64_t{on_one} * processors;
  return error;
}

}  // namespace wanda::cuda
#else
#include "simt.h"
#endif

namespace wanda::cuda {

constexpr uint32_t kFullMask = 0xffffffffu;

}  // namespace wanda::cuda
