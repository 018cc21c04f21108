// 2:4 packing with AVX-512. See pack_24_impl.h.
#include "pack_24.h"

#if defined(__x86_64__)

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "convert.h"
#include "target_avx512_begin.h"

#include "nm_lanes_avx512.h"
#include "pack_24_impl.h"

namespace wanda::cpu {
namespace {

// Entry i: the byte shuffle that moves the two values of a group with non-zero bits i to its first four
// bytes.
struct alignas(64) PackShuffles {
  uint64_t entry[16];
  constexpr PackShuffles() : entry() {
    for (uint64_t i = 0; i < 16; ++i) {
      const uint64_t m0 = i & 1, m1 = i >> 1 & 1, m3 = i >> 3;
      const uint64_t index0 = m0 ? 0 : m1 ? 1 : 2;
      const uint64_t index1 = ((m0 & m1) | (~m0 & ~m1 & 1) | m3) | ((~m0 & m1) | (~m1 & 1)) << 1;
      entry[i] = 2 * index0 | (2 * index0 + 1) << 8 | 2 * index1 << 16 | (2 * index1 + 1) << 24;
    }
  }
};
constexpr PackShuffles kPackShuffles;

struct PackLanesAvx512 {
  using Nm = NmLanesAvx512;

  static __mmask32 half(uint64_t word, int64_t j) { return static_cast<__mmask32>(word >> (j % 64)); }

  static void nonzero(const uint16_t* w, int64_t count, const NmBits& pruned, NmBits& out) {
    for (int64_t j = 0; j < count; j += 64) {
      const uint64_t keep = ~pruned.word[j / 64];
      const __m512i magnitude = _mm512_set1_epi16(0x7fff);
      const uint64_t low = _mm512_mask_test_epi16_mask(half(keep, 0), _mm512_loadu_si512(w + j), magnitude);
      const uint64_t high =
          _mm512_mask_test_epi16_mask(half(keep, 32), _mm512_loadu_si512(w + j + 32), magnitude);
      out.word[j / 64] = low | high << 32;
    }
  }

  // The byte shuffles of eight groups come from a table of 16 qwords in two registers, indexed by four
  // non-zero bits each. 16-bit vpcompress would need VBMI2, and costs Zen 4 several times as much.
  static void values(const uint16_t* w, int64_t count, const NmBits& pruned, const NmBits& nonzero,
                     uint16_t* out) {
    const __m512i table_low = _mm512_load_si512(kPackShuffles.entry);
    const __m512i table_high = _mm512_load_si512(kPackShuffles.entry + 8);
    const __m512i second_group =
        _mm512_setr_epi64(0, 0x08080808, 0, 0x08080808, 0, 0x08080808, 0, 0x08080808);
    const __m512i shifts_low = _mm512_setr_epi64(0, 4, 8, 12, 16, 20, 24, 28);
    const __m512i shifts_high = _mm512_setr_epi64(32, 36, 40, 44, 48, 52, 56, 60);
    for (int64_t j = 0; j < count; j += 32) {
      const __m512i kept = _mm512_maskz_loadu_epi16(half(~pruned.word[j / 64], j), w + j);
      const __m512i word = _mm512_set1_epi64(static_cast<int64_t>(nonzero.word[j / 64]));
      const __m512i group = _mm512_srlv_epi64(word, j % 64 == 0 ? shifts_low : shifts_high);
      const __m512i shuffle = _mm512_permutex2var_epi64(table_low, group, table_high);
      const __m512i packed = _mm512_shuffle_epi8(kept, _mm512_or_si512(shuffle, second_group));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + j / 2), _mm512_cvtepi64_epi32(packed));
    }
  }
};

}  // namespace

int64_t pack_24_avx512(const Pack24Params& params, int64_t begin, int64_t end) {
  return pack_24_run<PackLanesAvx512>(params, begin, end);
}

}  // namespace wanda::cpu

#include "target_end.h"

#else

namespace wanda::cpu {

int64_t pack_24_avx512(const Pack24Params& params, int64_t begin, int64_t end) {
  return pack_24_scalar(params, begin, end);
}

}  // namespace wanda::cpu

#endif
