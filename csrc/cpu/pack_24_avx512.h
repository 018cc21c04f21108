// 2:4 packing's steps with AVX-512.
#pragma once

#include "nm_avx512.h"
#include "pack_24_impl.h"

namespace wanda::cpu {
namespace {

// Entry i: the byte shuffle that moves the two values of a group with non-zero bits i to its first four
// bytes.
struct alignas(64) PackShuffles {
  uint32_t entry[16];
  constexpr PackShuffles() : entry() {
    for (uint32_t i = 0; i < 16; ++i) {
      const uint32_t m0 = i & 1, m1 = i >> 1 & 1, m3 = i >> 3;
      const uint32_t index0 = m0 ? 0 : m1 ? 1 : 2;
      const uint32_t index1 = ((m0 & m1) | (~m0 & ~m1 & 1) | m3) | ((~m0 & m1) | (~m1 & 1)) << 1;
      entry[i] = 2 * index0 | (2 * index0 + 1) << 8 | 2 * index1 << 16 | (2 * index1 + 1) << 24;
    }
  }
};
constexpr PackShuffles kPackShuffles;

template <>
struct PackSteps<Avx512> {
  static __mmask32 half(uint64_t word, int64_t j) { return static_cast<__mmask32>(word >> (j % 64)); }

  static void nonzero(const uint16_t* w, int64_t count, const NmBits& pruned, NmBits& out) {
    // Seldom is any weight zero: then the non-zeros are what is kept, and one cheap pass shows it.
    __m512i smallest = _mm512_set1_epi16(-1);
    for (int64_t j = 0; j < count; j += 32) {
      const __m512i v = _mm512_loadu_si512(w + j);
      smallest = _mm512_min_epu16(smallest, _mm512_add_epi16(v, v));
    }
    if (_mm512_test_epi16_mask(smallest, smallest) == ~__mmask32{0}) {
      for (int64_t j = 0; j < count; j += 64) out.word[j / 64] = ~pruned.word[j / 64];
      return;
    }
    for (int64_t j = 0; j < count; j += 64) {
      const uint64_t keep = ~pruned.word[j / 64];
      const __m512i magnitude = _mm512_set1_epi16(0x7fff);
      const uint64_t low = _mm512_mask_test_epi16_mask(half(keep, 0), _mm512_loadu_si512(w + j), magnitude);
      const uint64_t high =
          _mm512_mask_test_epi16_mask(half(keep, 32), _mm512_loadu_si512(w + j + 32), magnitude);
      out.word[j / 64] = low | high << 32;
    }
  }

  // The byte shuffles of eight groups come from a table of 16 dwords in a register, indexed by four non-zero
  // bits each. 16-bit vpcompress would need VBMI2, and costs Zen 4 several times as much.
  static __m512i pack_32(const uint16_t* w, uint64_t pruned, uint64_t nonzero, int64_t half_word) {
    const __m512i table = _mm512_load_si512(kPackShuffles.entry);
    const __m512i second_group = _mm512_maskz_set1_epi32(0x2222, 0x08080808);
    const __m512i shifts = _mm512_setr_epi32(0, 4, 0, 0, 8, 12, 0, 0, 16, 20, 0, 0, 24, 28, 0, 0);
    const __m512i kept = _mm512_maskz_loadu_epi16(half(~pruned, half_word), w);
    const __m512i group =
        _mm512_srlv_epi32(_mm512_set1_epi32(static_cast<int>(nonzero >> half_word)), shifts);
    const __m512i shuffle = _mm512_permutexvar_epi32(group, table);
    return _mm512_shuffle_epi8(kept, _mm512_or_si512(shuffle, second_group));
  }

  // Stores go past the caches where they may: the lines need not be read first, 1.2-1.5 x memcpy instead
  // of 1.5-1.7.
  static void values(const uint16_t* w, int64_t count, const NmBits& pruned, const NmBits& nonzero,
                     uint16_t* out) {
    const bool aligned = reinterpret_cast<uintptr_t>(out) % 64 == 0;
    const __m512i low_qwords = _mm512_setr_epi64(0, 2, 4, 6, 8, 10, 12, 14);
    for (int64_t j = 0; j < count; j += 64) {
      const __m512i low = pack_32(w + j, pruned.word[j / 64], nonzero.word[j / 64], 0);
      const __m512i high = pack_32(w + j + 32, pruned.word[j / 64], nonzero.word[j / 64], 32);
      const __m512i packed = _mm512_permutex2var_epi64(low, low_qwords, high);
      if (aligned) {
        _mm512_stream_si512(reinterpret_cast<__m512i*>(out + j / 2), packed);
      } else {
        _mm512_storeu_si512(out + j / 2, packed);
      }
    }
  }
};

}  // namespace
}  // namespace wanda::cpu
