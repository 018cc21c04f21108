// CUDA C++ on the CPU, for tests: the compiler sees this in place of the CUDA toolkit and every CUDA thread
// runs as a fiber (simt.cpp). Kernel headers compile unchanged. What is here is what they use; a kernel that
// needs more fails to compile.
//
// Blocks run one after the other on one OS thread. A thread runs until it waits for others, so a test chooses
// the order (simt::Options). Barriers, warp-wide operations and their masks are checked by source line; each
// such place is a site that a test can disable, to see that something notices. Kernels are compiled with
// -fsanitize=thread, whose hooks hooks.cpp defines: every access to shared or global memory is checked for
// races, bounds and, in shared memory, for having been written.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <string>

#include "../../csrc/cuda/plan.h"

struct CUstream_st;

namespace simt {

struct Index3 {
  uint32_t x = 0, y = 0, z = 0;
};
struct Dim3 {
  uint32_t x = 1, y = 1, z = 1;
};

enum Order { kForward, kReverse, kRandom, kWarpAhead };
enum SiteKind { kBarrier, kMask, kCopyWait };

extern Index3 thread_index, block_index;
extern Dim3 block_dim, grid_dim;

void launch(Dim3 grid, uint32_t threads, size_t shared_bytes, const std::function<void()>& kernel);
int register_site(const char* file, int line, int counter, SiteKind kind);

unsigned char* dynamic_shared();
void block_barrier(int site);
// The mask to use at `site`: `mask`, or one lane less where the test has taken one out.
uint32_t mask_at(int site, uint32_t mask);
// Deposits `value`, waits for the lanes of `mask`; what lane i deposited is then in lanes[i].
void exchange(int site, uint32_t mask, uint64_t value, uint64_t (&lanes)[32]);
void warp_barrier(int site);
uint32_t lane();
// Of memory that a kernel may touch: bounds, races, whether it was written.
void check_access(uintptr_t address, size_t size, bool is_write, bool is_atomic);
void fail(const std::string& text);  // stops the launch: fibers are abandoned where they are
uint32_t atomic_add(uint32_t* address, uint32_t value);
void copy_async(void* to, const void* from, size_t size);  // nullptr: zeros
// Of each of the four matrices of ldmatrix.
void load_matrices(const void* row, uint32_t (&part)[4]);
void copy_commit();
void copy_wait(int site, int pending);
float half_to_float(uint16_t bits);
uint16_t float_to_half(float value);
uint16_t float_to_bfloat16(float value);
struct Mma {  // one lane's part of mma m16n8k16
  uint32_t a[4], b[2];
};
void mma(bool is_bfloat16, const Mma& own, float (&sum)[4]);
struct SparseMma {  // one lane's part of mma.sp m16n8k32
  uint32_t a[4], b[4], metadata;
};
void mma_sparse(bool is_bfloat16, int selector, const SparseMma& own, float (&sum)[4]);

template <class T>
uint64_t pack(T value) {
  static_assert(sizeof(T) <= 8, "a shuffle moves at most 8 bytes");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  return bits;
}
template <class T>
T unpack(uint64_t bits) {
  T value;
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

template <class T>
T shuffle(int site, uint32_t mask, T value, uint32_t source) {
  uint64_t lanes[32];
  exchange(site, mask, pack(value), lanes);
  return source < 32 ? unpack<T>(lanes[source]) : value;
}
inline uint32_t ballot(int site, uint32_t mask, bool predicate) {
  uint64_t lanes[32];
  exchange(site, mask, predicate, lanes);
  uint32_t votes = 0;
  for (int i = 0; i < 32; ++i) votes |= static_cast<uint32_t>(mask >> i & 1 && lanes[i] != 0) << i;
  return votes;
}
inline uint32_t reduce_add(int site, uint32_t mask, uint32_t value) {
  uint64_t lanes[32];
  exchange(site, mask, value, lanes);
  uint32_t total = 0;
  for (int i = 0; i < 32; ++i) total += mask >> i & 1 ? static_cast<uint32_t>(lanes[i]) : 0;
  return total;
}
inline uint32_t reduce_min(int site, uint32_t mask, uint32_t value) {
  uint64_t lanes[32];
  exchange(site, mask, value, lanes);
  uint32_t least = UINT32_MAX;
  for (int i = 0; i < 32; ++i) {
    if (mask >> i & 1) least = std::min(least, static_cast<uint32_t>(lanes[i]));
  }
  return least;
}
inline uint32_t reduce_max(int site, uint32_t mask, uint32_t value) {
  return ~reduce_min(site, mask, ~value);
}
inline float canonical(float value) {  // the device's only NaN
  return value == value ? value : unpack<float>(0x7fffffffu);
}

}  // namespace simt

// One number for each place in the source text.
#define SIMT_SITE(kind)                                                                           \
  ([] {                                                                                           \
    static const int site = ::simt::register_site(__FILE__, __LINE__, __COUNTER__, ::simt::kind); \
    return site;                                                                                  \
  }())
#define SIMT_MASKED(call, mask, ...)                             \
  ([&](int simt_site) {                                          \
    const uint32_t simt_mask = ::simt::mask_at(simt_site, mask); \
    return ::simt::call(simt_site, simt_mask, __VA_ARGS__);      \
  }(SIMT_SITE(kMask)))

#define __global__
#define __device__
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define WANDA_DEVICE inline
#define WANDA_DYNAMIC_SHARED(name) unsigned char* const name = ::simt::dynamic_shared()

#define threadIdx (::simt::thread_index)
#define blockIdx (::simt::block_index)
#define blockDim (::simt::block_dim)
#define gridDim (::simt::grid_dim)

#define __log2f(x) std::log2(x)  // the C library declares a function of that name
#define __syncthreads() ::simt::block_barrier(SIMT_SITE(kBarrier))
#define __syncwarp() ::simt::warp_barrier(SIMT_SITE(kBarrier))
#define __shfl_sync(mask, value, source) SIMT_MASKED(shuffle, mask, value, (source) & 31)
#define __shfl_xor_sync(mask, value, step) SIMT_MASKED(shuffle, mask, value, ::simt::lane() ^ (step))
#define __shfl_up_sync(mask, value, step) SIMT_MASKED(shuffle, mask, value, ::simt::lane() - (step))
#define __ballot_sync(mask, predicate) SIMT_MASKED(ballot, mask, predicate)
#define __reduce_add_sync(mask, value) SIMT_MASKED(reduce_add, mask, value)
#define __reduce_max_sync(mask, value) SIMT_MASKED(reduce_max, mask, value)
#define __reduce_min_sync(mask, value) SIMT_MASKED(reduce_min, mask, value)

struct uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

using std::max;
using std::min;

inline uint32_t __float_as_uint(float value) { return simt::unpack<uint32_t>(simt::pack(value)); }
inline float __uint_as_float(uint32_t bits) { return simt::unpack<float>(bits); }
inline float __fmul_rn(float a, float b) { return simt::canonical(a * b); }
inline float __fadd_rn(float a, float b) { return simt::canonical(a + b); }
inline float __fmaf_rn(float a, float b, float c) { return simt::canonical(std::fma(a, b, c)); }
inline double __dmul_rn(double a, double b) { return a * b; }
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __fma_rn(double a, double b, double c) { return std::fma(a, b, c); }
inline long long __double_as_longlong(double value) { return simt::unpack<long long>(simt::pack(value)); }
inline double __longlong_as_double(long long bits) { return simt::unpack<double>(simt::pack(bits)); }
inline float __fdiv_rn(float a, float b) { return simt::canonical(a / b); }
inline float __fdividef(float a, float b) { return a / b; }
inline uint32_t __dp2a_lo(uint32_t halves, uint32_t bytes, uint32_t sum) {
  return sum + (halves & 0xffff) * (bytes & 255) + (halves >> 16) * (bytes >> 8 & 255);
}
inline int __dp4a(int a, int b, int sum) {
  for (int i = 0; i < 32; i += 8) sum += static_cast<int8_t>(a >> i) * static_cast<int8_t>(b >> i);
  return sum;
}
inline int __popc(uint32_t value) { return __builtin_popcount(value); }
inline int __ffs(uint32_t value) { return __builtin_ffs(static_cast<int>(value)); }
inline int __clz(uint32_t value) { return value == 0 ? 32 : __builtin_clz(value); }
inline uint32_t __funnelshift_l(uint32_t low, uint32_t high, uint32_t shift) {
  return static_cast<uint32_t>(((static_cast<uint64_t>(high) << 32 | low) << (shift & 31)) >> 32);
}
inline uint32_t __funnelshift_r(uint32_t low, uint32_t high, uint32_t shift) {
  return static_cast<uint32_t>((static_cast<uint64_t>(high) << 32 | low) >> (shift & 31));
}
inline uint32_t __funnelshift_rc(uint32_t low, uint32_t high, uint32_t shift) {
  return static_cast<uint32_t>((static_cast<uint64_t>(high) << 32 | low) >> std::min(shift, 32u));
}
template <class T>
inline T __ldg(const T* address) {
  return *address;
}
inline uint32_t atomicAdd(uint32_t* address, uint32_t value) { return simt::atomic_add(address, value); }

namespace wanda::cuda {

template <class Kernel, class... Arguments>
int launch(Kernel* kernel, const Shape& shape, CUstream_st*, const Arguments&... arguments) {
  const simt::Dim3 grid{static_cast<uint32_t>(shape.grid), static_cast<uint32_t>(shape.matrices), 1};
  simt::launch(grid, static_cast<uint32_t>(shape.threads), static_cast<size_t>(shape.shared_bytes),
               [&] { kernel(arguments...); });
  return 0;
}
template <class Kernel>
int resident_blocks(Kernel*, const Shape&, int64_t& blocks) {
  blocks = 1;
  return 0;
}
template <class Kernel>
int allow_shared(Kernel*, int64_t) {
  return 0;
}
inline void copy_async_16(void* shared, const void* global, bool is_there) {
  simt::copy_async(shared, is_there ? global : nullptr, 16);
}
using SharedAddress = uint32_t;  // from the block's shared memory on
inline SharedAddress shared_address(const void* shared) {
  return static_cast<uint32_t>(static_cast<const unsigned char*>(shared) - simt::dynamic_shared());
}
inline void store_shared(SharedAddress to, uint32_t a, uint32_t b) {
  *reinterpret_cast<uint2*>(simt::dynamic_shared() + to) = make_uint2(a, b);
}
template <class T>
T load_shared(SharedAddress from) {
  return *reinterpret_cast<const T*>(simt::dynamic_shared() + from);
}
inline void copy_async_16(SharedAddress to, const void* global) {
  simt::copy_async(simt::dynamic_shared() + to, global, 16);
}
inline void copy_async_8(SharedAddress to, const void* global) {
  simt::copy_async(simt::dynamic_shared() + to, global, 8);
}
inline void copy_async_commit() { simt::copy_commit(); }
#define copy_async_wait SIMT_COPY_WAIT{SIMT_SITE(kCopyWait)}.wait
struct SIMT_COPY_WAIT {
  int site;
  template <int kPending>
  void wait() const {
    simt::copy_wait(site, kPending);
  }
};
template <class T>
T opaque(T value) {
  return value;
}
inline int64_t opaque_64(int64_t value) { return value; }
inline uint32_t permute_bytes(uint32_t low, uint32_t high, uint32_t selector) {
  const uint64_t bytes = static_cast<uint64_t>(high) << 32 | low;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t nibble = selector >> (4 * i) & 15;
    const uint32_t byte = bytes >> (8 * (nibble & 7)) & 255;
    result |= (nibble & 8 ? (byte & 128 ? 255u : 0u) : byte) << (8 * i);
  }
  return result;
}
template <uint32_t kSelector>
uint32_t permute_bytes(uint32_t low, uint32_t high) {
  return permute_bytes(low, high, kSelector);
}
inline uint4 load_16(const void* from) { return *static_cast<const uint4*>(from); }
inline void store_16(void* to, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  *static_cast<uint4*>(to) = {a, b, c, d};
}
inline void load_matrices(SharedAddress row, uint32_t (&part)[4]) {
  simt::load_matrices(simt::dynamic_shared() + row, part);
}
inline float half_to_float(uint16_t bits) { return simt::half_to_float(bits); }
inline uint16_t float_to_half(float value) { return simt::float_to_half(value); }
inline uint16_t float_to_bfloat16(float value) { return simt::float_to_bfloat16(value); }
template <bool kIsBFloat16>
void mma(float (&sum)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  simt::mma(kIsBFloat16, {{a[0], a[1], a[2], a[3]}, {b[0], b[1]}}, sum);
}
template <bool kIsBFloat16, int kSelector>
void mma_sparse(float (&sum)[4], const uint32_t (&a)[4], const uint32_t (&b)[4], uint32_t metadata) {
  simt::mma_sparse(kIsBFloat16, kSelector, {{a[0], a[1], a[2], a[3]}, {b[0], b[1], b[2], b[3]}, metadata},
                   sum);
}

}  // namespace wanda::cuda
