// AVX2 as isa.h has it: registers of 8 float32, what operators share of them.
#pragma once

#include "scalar.h"

namespace wanda::cpu {
namespace {

inline __m256i load_256(const void* from) { return _mm256_loadu_si256(static_cast<const __m256i*>(from)); }
inline void store_256(void* to, __m256i x) { _mm256_storeu_si256(static_cast<__m256i*>(to), x); }
inline __m128i load_128(const void* from) { return _mm_loadu_si128(static_cast<const __m128i*>(from)); }

struct Avx2 {
  static constexpr int kLanes = 8;
  static constexpr int kBytes = 32;
  using Floats = __m256;
  using Ints = __m256i;
  struct Pair {
    Floats a, b;
  };

  static Floats zero() { return _mm256_setzero_ps(); }
  static Floats load(const float* aligned) { return _mm256_load_ps(aligned); }
  static Floats load_unaligned(const float* from) { return _mm256_loadu_ps(from); }
  static void store(float* aligned, Floats x) { _mm256_store_ps(aligned, x); }
  static Floats add(Floats x, Floats y) { return _mm256_add_ps(x, y); }
  static Floats multiply(Floats x, Floats y) { return _mm256_mul_ps(x, y); }
  static Floats multiply_add(Floats x, Floats y, Floats z) { return _mm256_fmadd_ps(x, y, z); }
  static __m256d multiply_add(__m256d x, __m256d y, __m256d z) { return _mm256_fmadd_pd(x, y, z); }
  static Ints bits(Floats x) { return _mm256_castps_si256(x); }
  static Ints all_of(int32_t x) { return _mm256_set1_epi32(x); }
  static Ints both(Ints x, Ints y) { return _mm256_and_si256(x, y); }
  static Ints minimum(Ints x, Ints y) { return _mm256_min_epu32(x, y); }

  static double sum(Floats x) {
    alignas(32) float lanes[8];
    _mm256_store_ps(lanes, x);
    double sum = 0;
    for (const float lane : lanes) sum += lane;
    return sum;
  }

  // kLanes elements.
  template <Dtype dtype>
  static Floats values(const typename Element<dtype>::Bits* w) {
    if constexpr (dtype == Dtype::kFloat32) {
      return _mm256_loadu_ps(reinterpret_cast<const float*>(w));
    } else if constexpr (dtype == Dtype::kBFloat16) {
      return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(load_128(w)), 16));
    } else {
      return _mm256_cvtph_ps(load_128(w));
    }
  }

  // 2 * kLanes elements. bfloat16: even columns and odd columns, two cheap operations where widening in order
  // takes two shuffles more.
  template <Dtype dtype>
  static Pair load_pair(const typename Element<dtype>::Bits* w) {
    if constexpr (dtype == Dtype::kBFloat16) {
      const __m256i pairs = load_256(w);
      return {_mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16)),
              _mm256_castsi256_ps(_mm256_and_si256(pairs, _mm256_set1_epi32(-65536)))};
    } else {
      return {values<dtype>(w), values<dtype>(w + kLanes)};
    }
  }
};

}  // namespace
}  // namespace wanda::cpu
