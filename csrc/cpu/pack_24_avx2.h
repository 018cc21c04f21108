// 2:4 packing's steps with AVX2.
#pragma once

#include "nm_avx2.h"
#include "pack_24_impl.h"

namespace wanda::cpu {
namespace {

// Entry i: the byte shuffle that moves the values of two groups with non-zero bits i (four each) to the first
// eight bytes.
struct PackShuffles {
  uint64_t entry[256];
  constexpr PackShuffles() : entry() {
    for (uint64_t i = 0; i < 256; ++i) {
      for (uint64_t g = 0; g < 2; ++g) {
        const uint64_t m0 = i >> (4 * g) & 1, m1 = i >> (4 * g + 1) & 1, m3 = i >> (4 * g + 3) & 1;
        const uint64_t index0 = m0 ? 0 : m1 ? 1 : 2;
        const uint64_t index1 = ((m0 & m1) | (~m0 & ~m1 & 1) | m3) | ((~m0 & m1) | (~m1 & 1)) << 1;
        const uint64_t byte0 = 8 * g + 2 * index0, byte1 = 8 * g + 2 * index1;
        entry[i] |= (byte0 | (byte0 + 1) << 8 | byte1 << 16 | (byte1 + 1) << 24) << (32 * g);
      }
    }
  }
};
constexpr PackShuffles kPackShuffles;

template <>
struct PackSteps<Avx2> {
  static void nonzero(const uint16_t* w, int64_t count, const NmBits& pruned, NmBits& out) {
    const __m256i none = _mm256_setzero_si256();
    for (int64_t j = 0; j < count; j += 64) {
      uint64_t zero = 0;
      for (int64_t i = 0; i < 64; i += 32) {
        const __m256i first = _mm256_cmpeq_epi16(_mm256_slli_epi16(load_256(w + j + i), 1), none);
        const __m256i second = _mm256_cmpeq_epi16(_mm256_slli_epi16(load_256(w + j + i + 16), 1), none);
        // packs interleaves the 128-bit lanes of its operands: 0xd8 sorts them.
        const __m256i bytes = _mm256_permute4x64_epi64(_mm256_packs_epi16(first, second), 0xd8);
        zero |= uint64_t{static_cast<uint32_t>(_mm256_movemask_epi8(bytes))} << i;
      }
      out.word[j / 64] = ~(zero | pruned.word[j / 64]);
    }
  }

  // One table look-up and one shuffle per two groups. pext would do as well, but is microcoded before Zen 3.
  static void pack_8(__m128i kept, uint64_t nonzero, uint16_t* out) {
    const __m128i shuffle =
        _mm_loadl_epi64(reinterpret_cast<const __m128i*>(kPackShuffles.entry + (nonzero & 0xff)));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(out), _mm_shuffle_epi8(kept, shuffle));
  }

  static void values(const uint16_t* w, int64_t count, const NmBits& pruned, const NmBits& nonzero,
                     uint16_t* out) {
    const __m256i lane_bits = _mm256_setr_epi16(1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192,
                                                16384, static_cast<int16_t>(0x8000));
    for (int64_t j = 0; j < count; j += 16) {
      const __m256i keep_bits = _mm256_set1_epi16(static_cast<int16_t>(~pruned.word[j / 64] >> (j % 64)));
      const __m256i keep = _mm256_cmpeq_epi16(_mm256_and_si256(keep_bits, lane_bits), lane_bits);
      const __m256i kept = _mm256_and_si256(load_256(w + j), keep);
      const uint64_t bits = nonzero.word[j / 64] >> (j % 64);
      pack_8(_mm256_castsi256_si128(kept), bits, out + j / 2);
      pack_8(_mm256_extracti128_si256(kept, 1), bits >> 8, out + j / 2 + 4);
    }
  }
};

}  // namespace
}  // namespace wanda::cpu
