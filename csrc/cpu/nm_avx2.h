// N:M selection's steps with AVX2.
#pragma once

#include "nm_impl.h"
#include "vector_avx2.h"

namespace wanda::cpu {
namespace {

template <>
struct NmSteps<Avx2> {
  template <int r>
  static __m256i rotate(__m256i v) {
    return _mm256_shuffle_epi32(v, r == 1 ? 0x39 : r == 2 ? 0x4e : 0x93);
  }
  static __m256i even_quads(__m256i a, __m256i b) { return _mm256_permute2x128_si256(a, b, 0x20); }
  static __m256i odd_quads(__m256i a, __m256i b) { return _mm256_permute2x128_si256(a, b, 0x31); }

  static void store(uint64_t* words, int64_t at, __m256i a, __m256i b) {
    const int greater = _mm256_movemask_ps(_mm256_castsi256_ps(_mm256_cmpgt_epi32(a, b)));
    reinterpret_cast<unsigned char*>(words)[at] = static_cast<unsigned char>(~greater);
  }

  // With a bias that makes lane 3 < lane 0.
  static void store_next(uint64_t* words, int64_t at, __m256i key) {
    const __m256i bias = _mm256_setr_epi32(0, 0, 0, 1, 0, 0, 0, 1);
    store(words, at, _mm256_add_epi32(key, bias), rotate<1>(key));
  }

  static void zero_pruned(uint32_t* w, int64_t count, const NmBits& bits) {
    const __m256i lane_bits = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    int64_t j = 0;
    for (; j + 8 <= count; j += 8) {
      const __m256i pruned = _mm256_set1_epi32(static_cast<int>(bits.word[j / 64] >> (j % 64)));
      const __m256i keep = _mm256_cmpeq_epi32(_mm256_and_si256(pruned, lane_bits), _mm256_setzero_si256());
      store_256(w + j, _mm256_and_si256(load_256(w + j), keep));
    }
    for (; j < count; ++j) w[j] = bits.test(j) ? 0 : w[j];
  }

  static void zero_pruned(uint16_t* w, int64_t count, const NmBits& bits) {
    const __m256i lane_bits = _mm256_setr_epi16(1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192,
                                                16384, static_cast<int16_t>(0x8000));
    int64_t j = 0;
    for (; j + 16 <= count; j += 16) {
      const __m256i pruned = _mm256_set1_epi16(static_cast<int16_t>(bits.word[j / 64] >> (j % 64)));
      const __m256i keep = _mm256_cmpeq_epi16(_mm256_and_si256(pruned, lane_bits), _mm256_setzero_si256());
      store_256(w + j, _mm256_and_si256(load_256(w + j), keep));
    }
    for (; j < count; ++j) w[j] = bits.test(j) ? uint16_t{0} : w[j];
  }

  static void write_mask(bool* mask, int64_t count, const NmBits& bits) {
    int64_t j = 0;
    for (; j + 8 <= count; j += 8) {
      const uint64_t pruned = bits.word[j / 64] >> (j % 64) & 0xff;
      const uint64_t bytes = _pdep_u64(pruned, 0x0101010101010101u);
      std::memcpy(mask + j, &bytes, sizeof(bytes));
    }
    for (; j < count; ++j) mask[j] = bits.test(j);
  }
};

}  // namespace
}  // namespace wanda::cpu
