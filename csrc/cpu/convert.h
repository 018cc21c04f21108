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

// Selects by masks: with conditional expressions GCC 12 keeps branches and does not vectorise callers' loops.
inline float float_of_fp16(uint16_t half) {
  const uint32_t magnitude = half & 0x7fffu;
  const uint32_t denormal_mask = 0u - static_cast<uint32_t>(magnitude < 0x0400u);
  const uint32_t special_mask =
      0u - static_cast<uint32_t>(magnitude >= 0x7c00u);  // infinity, and NaN with its payload
  // A denormal becomes 0.5 + magnitude * 2^-24 by its bits; the subtraction is exact.
  const uint32_t denormal = bits_of_float(float_of_bits(magnitude | 0x3f000000u) - 0.5f);
  const uint32_t normal = ((magnitude << 13) + (112u << 23)) | (special_mask & 0x7f800000u);
  return float_of_bits((denormal & denormal_mask) | (normal & ~denormal_mask) | (half & 0x8000u) << 16);
}

// To nearest even, as ATen rounds; NaN becomes 0x7fc0.
inline uint16_t bf16_of_float(float value) {
  const uint32_t bits = bits_of_float(value);
  const uint32_t nan_mask = 0u - static_cast<uint32_t>((bits & 0x7fffffffu) > 0x7f800000u);
  const uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
  return static_cast<uint16_t>((rounded & ~nan_mask) | (0x7fc0u & nan_mask));
}

// To nearest even, as ATen rounds; NaN becomes 0x7e00 with its sign.
inline uint16_t fp16_of_float(float value) {
  const uint32_t sign = bits_of_float(value) >> 16 & 0x8000u;
  const uint32_t magnitude = bits_of_float(value) & 0x7fffffffu;
  const uint32_t denormal_mask = 0u - static_cast<uint32_t>(magnitude < 0x38800000u);   // below 2^-14
  const uint32_t infinity_mask = 0u - static_cast<uint32_t>(magnitude >= 0x477ff000u);  // 65,520 and up
  const uint32_t nan_mask = 0u - static_cast<uint32_t>(magnitude > 0x7f800000u);
  // A float32 beside 0.5 has steps of 2^-24, which are those of a fp16 denormal: the addition rounds.
  const uint32_t denormal = bits_of_float(float_of_bits(magnitude & denormal_mask) + 0.5f) - 0x3f000000u;
  const uint32_t normal = ((magnitude + 0xfffu + (magnitude >> 13 & 1u)) >> 13) - (112u << 10);
  const uint32_t finite = (denormal & denormal_mask) | (normal & ~denormal_mask);
  const uint32_t special = 0x7c00u | (0x0200u & nan_mask);
  return static_cast<uint16_t>(sign | (finite & ~infinity_mask) | (special & infinity_mask));
}

template <Dtype dtype>
inline float to_float(typename Element<dtype>::Bits bits) {
  if constexpr (dtype == Dtype::kFloat32) {
    return float_of_bits(bits);
  } else if constexpr (dtype == Dtype::kBFloat16) {
    return float_of_bf16(bits);
  } else {
    return float_of_fp16(bits);
  }
}

// To the nearest element.
template <Dtype dtype>
inline typename Element<dtype>::Bits from_float(float value) {
  if constexpr (dtype == Dtype::kFloat32) {
    return bits_of_float(value);
  } else if constexpr (dtype == Dtype::kBFloat16) {
    return bf16_of_float(value);
  } else {
    return fp16_of_float(value);
  }
}

constexpr float kStepOf1 = 12582912.0f;  // 2^23 + 2^22: beside it a float32 has steps of 1

// To the nearest whole number, of two the even one; |value| <= 2^22.
inline int32_t whole_of(float value) {
  return static_cast<int32_t>(bits_of_float(value + kStepOf1)) - 0x4b400000;
}

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
