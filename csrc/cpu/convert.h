// Scalar conversions and score keys shared by the CPU kernels. Everything has internal linkage, so the header
// may be included before or after a target pragma. Loops over these functions vectorise: no branches, no
// tables.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

#include "../common/dtype.h"

namespace wanda::cpu {
namespace {

inline float float_of_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

inline uint32_t bits_of_float(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

inline float float_of_bf16(uint16_t half) { return float_of_bits(uint32_t{half} << 16); }

inline float float_of_fp16(uint16_t half) {
  const uint32_t magnitude = half & 0x7fffu;
  const uint32_t normal = (magnitude << 13) + (112u << 23);
  const uint32_t special = (magnitude << 13) | 0x7f800000u;  // infinity, and NaN with its payload
  const uint32_t denormal = bits_of_float(static_cast<float>(static_cast<int32_t>(magnitude)) * 0x1p-24f);
  uint32_t bits = magnitude < 0x0400u ? denormal : normal;
  bits = magnitude >= 0x7c00u ? special : bits;
  return float_of_bits(bits | (half & 0x8000u) << 16);
}

// Stored<dtype>::Type is the storage of one element, Stored<dtype>::load its float32 value.
template <Dtype dtype>
struct Stored;

template <>
struct Stored<Dtype::kFloat32> {
  using Type = float;
  static float load(float value) { return value; }
};

template <>
struct Stored<Dtype::kBFloat16> {
  using Type = uint16_t;
  static float load(uint16_t value) { return float_of_bf16(value); }
};

template <>
struct Stored<Dtype::kFloat16> {
  using Type = uint16_t;
  static float load(uint16_t value) { return float_of_fp16(value); }
};

// |w| * norm with one rounding. The sign of w cannot change the bits below the sign, so it is cleared first.
inline float score_of(float w, float norm) { return float_of_bits(bits_of_float(w) & 0x7fffffffu) * norm; }

// An int32 that orders as torch.sort orders the float: NaN (any sign, any payload) largest and equal, -0 ==
// +0.
inline int32_t order_key(float score) {
  const uint32_t bits = bits_of_float(score);
  const int32_t magnitude = static_cast<int32_t>(bits & 0x7fffffffu);
  const int32_t key = (bits >> 31) != 0 ? -magnitude : magnitude;
  return magnitude > 0x7f800000 ? INT32_MAX : key;
}

// While one lives, this thread computes with denormals, whatever torch.set_flush_denormal said: masks and
// sums must not depend on it. Does nothing on other processors than x86-64.
class HonourDenormals {
 public:
#if defined(__x86_64__)
  HonourDenormals() : saved_(_mm_getcsr()) {
    if ((saved_ & kFlushBits) != 0) _mm_setcsr(saved_ & ~kFlushBits);
  }
  ~HonourDenormals() {
    if ((saved_ & kFlushBits) != 0) _mm_setcsr(saved_);
  }

 private:
  static constexpr unsigned kFlushBits = 0x8040;  // flush to zero, denormals are zero
  unsigned saved_;
#else
  HonourDenormals() {}
  ~HonourDenormals() {}
#endif
 public:
  HonourDenormals(const HonourDenormals&) = delete;
  HonourDenormals& operator=(const HonourDenormals&) = delete;
};

}  // namespace
}  // namespace wanda::cpu
