// AVX-512 as isa.h has it: registers of 16 float32, what operators share of them.
#pragma once

#include "scalar.h"

namespace wanda::cpu {
namespace {

inline __m256i load_256(const void* from) { return _mm256_loadu_si256(static_cast<const __m256i*>(from)); }

struct Avx512 {
  static constexpr int kLanes = 16;
  static constexpr int kBytes = 64;
  using Floats = __m512;
  using Ints = __m512i;
  struct Pair {
    Floats a, b;
  };

  static Floats zero() { return _mm512_setzero_ps(); }
  static Floats load(const float* aligned) { return _mm512_load_ps(aligned); }
  static Floats load_unaligned(const float* from) { return _mm512_loadu_ps(from); }
  static void store(float* aligned, Floats x) { _mm512_store_ps(aligned, x); }
  static Floats add(Floats x, Floats y) { return _mm512_add_ps(x, y); }
  static Floats multiply(Floats x, Floats y) { return _mm512_mul_ps(x, y); }
  static Floats multiply_add(Floats x, Floats y, Floats z) { return _mm512_fmadd_ps(x, y, z); }
  static __m512d multiply_add(__m512d x, __m512d y, __m512d z) { return _mm512_fmadd_pd(x, y, z); }
  static Ints bits(Floats x) { return _mm512_castps_si512(x); }
  static Ints all_of(int32_t x) { return _mm512_set1_epi32(x); }
  static Ints both(Ints x, Ints y) { return _mm512_and_si512(x, y); }
  static Ints minimum(Ints x, Ints y) { return _mm512_min_epu32(x, y); }
  static double sum(Floats x) { return _mm512_reduce_add_ps(x); }

  // kLanes elements.
  template <Dtype dtype>
  static Floats values(const typename Element<dtype>::Bits* w) {
    if constexpr (dtype == Dtype::kFloat32) {
      return _mm512_loadu_ps(w);
    } else if constexpr (dtype == Dtype::kBFloat16) {
      return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(load_256(w)), 16));
    } else {
      return _mm512_cvtph_ps(load_256(w));
    }
  }

  // 2 * kLanes elements, as Avx2's.
  template <Dtype dtype>
  static Pair load_pair(const typename Element<dtype>::Bits* w) {
    if constexpr (dtype == Dtype::kBFloat16) {
      const __m512i pairs = _mm512_loadu_si512(w);
      return {_mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16)),
              _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(-65536)))};
    } else {
      return {values<dtype>(w), values<dtype>(w + kLanes)};
    }
  }
};

}  // namespace
}  // namespace wanda::cpu
