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

  // The shuffles of eight groups come from a table of 16 qwords in two registers. 16-bit vpcompress would
  // need VBMI2, and costs Zen 4 several times as much.
  static uint32_t pack_32(const uint16_t* w, uint32_t keep, uint16_t* values) {
    const __m512i kept = _mm512_maskz_loadu_epi16(keep, w);
    const uint32_t nonzero = _mm512_test_epi16_mask(kept, _mm512_set1_epi16(0x7fff));
    const __m512i group =
        _mm512_srlv_epi64(_mm512_set1_epi64(nonzero), _mm512_setr_epi64(0, 4, 8, 12, 16, 20, 24, 28));
    const __m512i shuffle = _mm512_permutex2var_epi64(_mm512_load_si512(kPackShuffles.entry), group,
                                                      _mm512_load_si512(kPackShuffles.entry + 8));
    const __m512i second_group =
        _mm512_setr_epi64(0, 0x08080808, 0, 0x08080808, 0, 0x08080808, 0, 0x08080808);
    const __m512i packed = _mm512_shuffle_epi8(kept, _mm512_or_si512(shuffle, second_group));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(values), _mm512_cvtepi64_epi32(packed));
    return nonzero;
  }

  static uint64_t pack(const uint16_t* w, uint64_t keep, uint16_t* values) {
    const uint64_t low = pack_32(w, static_cast<uint32_t>(keep), values);
    const uint64_t high = pack_32(w + 32, static_cast<uint32_t>(keep >> 32), values + 16);
    return low | high << 32;
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
