// Packed weights with values of 8 or 4 bits with AVX2. A row's bytes are spread to their columns, sixteen at
// a time, by a byte shuffle from a table by the mask, and multiplied with the row of x as they come; with
// several rows of x they are stored on the way. From the cache of a Zen 3 64 columns take, in ns:
//
//                          bitmap   2:4   bitmap, stored on the way
//   int8                      5.2   4.2   6.3
//   int4, groups of 128       5.4   4.2   6.4
//   int4, groups of 64        6.1   4.8   6.9
//
// Slower there: one load for sixteen columns of a bitmap and a table for each count of the first eight (6.0
// and 6.1 for 5.4 and 5.8), orders of 16 bytes joined by an OR instead of by loads.
//
// 8 bits: words, VPMADDWD with the words of x (VPMADDUBSW would saturate). 4 bits: VPMADDUBSW of unsigned
// halves and signed bytes of x: two products are at most 2 * 15 * 127, eight such sums fit 16 bits. These
// sums are too large by the offset times those of x, which is where starts come in.
#pragma once

#include "quantized_impl.h"
#include "vector_avx2.h"

namespace wanda::cpu {
namespace {

// Entry i: for each of eight columns the place of its byte among those that mask i keeps, in the lower and in
// the upper half of a register; 0x80, which gives 0, where not kept.
struct alignas(64) SpreadBytes {
  uint8_t lower[256][8], upper[256][8];
  constexpr SpreadBytes() : lower(), upper() {
    for (uint32_t mask = 0; mask < 256; ++mask) {
      uint8_t place = 0;
      for (uint32_t i = 0; i < 8; ++i) {
        const bool kept = (mask >> i & 1) != 0;
        lower[mask][i] = kept ? place : 0x80;
        upper[mask][i] = kept ? place + 8 : 0x80;
        place += kept;
      }
    }
  }
};
constexpr SpreadBytes kSpreadBytes;

// 2:4, entry i: likewise for the eight columns that a code byte is of, whose four bytes come behind those of
// 0, 1, 2 or 3 others in a register.
struct alignas(64) SpreadCodes {
  uint8_t behind[4][256][8];
  constexpr SpreadCodes() : behind() {
    for (uint32_t others = 0; others < 4; ++others) {
      for (uint32_t code = 0; code < 256; ++code) {
        for (uint32_t i = 0; i < 8; ++i) behind[others][code][i] = 0x80;
        uint8_t place = static_cast<uint8_t>(4 * others);
        for (uint32_t i = 0; i < 8; ++i) {
          if ((kPackedMasks.entry[code] >> i & 1) != 0) behind[others][code][i] = place++;
        }
      }
    }
  }
};
constexpr SpreadCodes kSpreadCodes;

// Around the intrinsic GCC 12 copies the mask first, for processors where POPCNT waits for what it
// overwrites.
WANDA_STEP inline int64_t population(uint64_t mask) {
  int64_t count;
  asm("popcntq %1, %0" : "=r"(count) : "r"(mask) : "cc");
  return count;
}

// Eight bytes from each.
inline __m128i two_of(const uint8_t* lower, const uint8_t* upper) {
  const __m128 first = _mm_castsi128_ps(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(lower)));
  return _mm_castps_si128(_mm_loadh_pi(first, reinterpret_cast<const __m64*>(upper)));
}

// The bytes of a row, sixteen columns at a time. `gaps`: what stands where nothing is kept, the offset; a
// byte is 0 there without it.
struct RowBytes {
  const uint8_t *next, *codes;
  __m128i gaps;

  WANDA_STEP void begin_block() const {
    _mm_prefetch(reinterpret_cast<const char*>(next) + 2048, _MM_HINT_T0);
    prefetch_l2(codes + 512);
  }

  WANDA_STEP __m256i with_offset(__m128i first, __m128i second) const {
    return _mm256_xor_si256(_mm256_set_m128i(second, first), _mm256_broadcastsi128_si256(gaps));
  }
};

struct OfBitmap : RowBytes {
  WANDA_STEP __m128i without_offset() {
    const uint64_t first = codes[0], second = codes[1];
    const __m128i order = two_of(kSpreadBytes.lower[first], kSpreadBytes.upper[second]);
    const uint8_t* others = next + population(first);
    const __m128i values = two_of(next, others);
    codes += 2;
    next = others + population(second);
    return _mm_shuffle_epi8(_mm_xor_si128(values, gaps), order);
  }

  WANDA_STEP __m256i thirty_two() {
    const __m128i first = without_offset(), second = without_offset();
    return with_offset(first, second);
  }
};

// Nothing may be read past the last value of a row.
struct OfSparse24 : RowBytes {
  WANDA_STEP static __m128i order_of(const uint8_t* two_codes, int others) {
    return two_of(kSpreadCodes.behind[others][two_codes[0]], kSpreadCodes.behind[others + 1][two_codes[1]]);
  }

  WANDA_STEP __m128i without_offset() {
    const __m128i values = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(next));
    const __m128i order = order_of(codes, 0);
    next += 8;
    codes += 2;
    return _mm_shuffle_epi8(_mm_xor_si128(values, gaps), order);
  }

  WANDA_STEP __m256i thirty_two() {
    const __m128i values = _mm_xor_si128(load_128(next), gaps);
    const __m128i first = order_of(codes, 0), second = order_of(codes + 2, 2);
    next += 16;
    codes += 4;
    return with_offset(_mm_shuffle_epi8(values, first), _mm_shuffle_epi8(values, second));
  }
};

// Likewise, where they lie in their columns.
struct InPlace {
  const uint8_t* next;
  __m128i gaps;

  WANDA_STEP void begin_block() const {}

  WANDA_STEP __m128i without_offset() {
    const __m128i bytes = load_128(next);
    next += 16;
    return _mm_xor_si128(bytes, gaps);
  }

  WANDA_STEP __m256i thirty_two() {
    const __m256i bytes = load_256(next);
    next += 32;
    return bytes;
  }
};

// A row's bytes in their columns: in `out`, or where they are.
template <class Bytes>
WANDA_PASS const uint8_t* in_columns(Bytes row, int64_t cols, uint8_t* out) {
  for (int64_t block = 0; block < cols; block += kQuantizedBlock) {
    row.begin_block();
    for (int64_t i = 0; i < kQuantizedBlock; i += 32) {
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + block + i), row.thirty_two());
    }
  }
  return out;
}

inline const uint8_t* in_columns(InPlace row, int64_t, uint8_t*) { return row.next; }

// Sixteen lanes.
struct Lanes {
  __m256 low, high;
};

inline float tree_of(Lanes lanes) {
  const __m256 eight = _mm256_add_ps(lanes.low, lanes.high);
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

// Sums of a part: the next blocks of a row, at most kMost.
template <int bits, bool is_high>
struct PartSums;

template <>
struct PartSums<8, false> {
  static constexpr int64_t kMost = 128;  // 128 * 4 * 128 * 32639 is below 2^31
  __m256i low, high;                     // lanes 0-7, 8-15
  template <class Bytes>
  WANDA_STEP PartSums(Bytes& row, const int8_t* whole, int64_t step, int64_t blocks) {
    __m256i pairs[4] = {_mm256_setzero_si256(), _mm256_setzero_si256(), _mm256_setzero_si256(),
                        _mm256_setzero_si256()};
    for (int64_t block = 0; block < blocks; ++block) {
      row.begin_block();
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        const __m256i words = _mm256_cvtepi8_epi16(row.without_offset());
        pairs[i] = _mm256_add_epi32(pairs[i], _mm256_madd_epi16(words, load_256(whole + 32 * i)));
      }
      whole += step;
    }
    low = _mm256_permute4x64_epi64(_mm256_hadd_epi32(pairs[0], pairs[1]), 0xd8);
    high = _mm256_permute4x64_epi64(_mm256_hadd_epi32(pairs[2], pairs[3]), 0xd8);
  }
};

template <bool is_high>
struct PartSums<4, is_high> {
  static constexpr int64_t kMost = 8;
  __m256i low, high;
  template <class Bytes>
  WANDA_STEP PartSums(Bytes& row, const int8_t* whole, int64_t step, int64_t blocks) {
    const __m256i half = _mm256_set1_epi8(15), ones = _mm256_set1_epi16(1);
    __m256i pairs[2] = {_mm256_setzero_si256(), _mm256_setzero_si256()};
    for (int64_t block = 0; block < blocks; ++block) {
      row.begin_block();
#pragma GCC unroll 2
      for (int i = 0; i < 2; ++i) {
        __m256i bytes = row.thirty_two();
        if (is_high) bytes = _mm256_srli_epi16(bytes, 4);
        const __m256i products =
            _mm256_maddubs_epi16(_mm256_and_si256(bytes, half), load_256(whole + 32 * i));
        pairs[i] = _mm256_add_epi16(pairs[i], products);
      }
      whole += step;
    }
    low = _mm256_madd_epi16(pairs[0], ones);
    high = _mm256_madd_epi16(pairs[1], ones);
  }
};

inline __m256d wide(__m256i sums, int half) {
  return _mm256_cvtepi32_pd(half == 0 ? _mm256_castsi256_si128(sums) : _mm256_extracti128_si256(sums, 1));
}

template <int bits, bool is_high, class Bytes>
WANDA_PASS float dot_256(const QuantizedWeight& w, int64_t row, Bytes bytes, const QuantizedColumns& x,
                         int64_t t) {
  using Sums = PartSums<bits, is_high>;
  const int64_t blocks = w.cols / kQuantizedBlock, together = blocks_of_part(w);
  const int64_t size = planes_of(w) * kQuantizedBlock, step = x.slab * size;
  const int8_t* whole = x.whole + t * size;
  const int32_t* starts = x.starts + t * kQuantizedLanes;  // of 4 bits
  const float* x_scales = x.scales + t * w.groups;
  Lanes lanes{_mm256_setzero_ps(), _mm256_setzero_ps()};
  if (w.groups == 1) {
    // Exact in float64, rounded once.
    __m256d sums[4];
    for (int i = 0; i < 4; ++i)
      sums[i] = bits == 4 ? wide(load_256(starts + i / 2 * 8), i % 2) : _mm256_setzero_pd();
    for (int64_t block = 0; block < blocks; block += Sums::kMost) {
      const int64_t count = blocks - block < Sums::kMost ? blocks - block : Sums::kMost;
      const Sums part(bytes, whole + block * step, step, count);
      for (int i = 0; i < 4; ++i) sums[i] = _mm256_add_pd(sums[i], wide(i < 2 ? part.low : part.high, i % 2));
    }
    const __m256 factor = _mm256_set1_ps(factor_of(w, row, 0, x_scales[0]));
    const __m256d weighed = _mm256_set1_pd(is_high ? 16.0 : 1.0);
    __m128 quarters[4];
    for (int i = 0; i < 4; ++i) quarters[i] = _mm256_cvtpd_ps(_mm256_mul_pd(sums[i], weighed));
    lanes.low = _mm256_add_ps(lanes.low, _mm256_mul_ps(_mm256_set_m128(quarters[1], quarters[0]), factor));
    lanes.high = _mm256_add_ps(lanes.high, _mm256_mul_ps(_mm256_set_m128(quarters[3], quarters[2]), factor));
    return tree_of(lanes);
  }
  constexpr int64_t kFactors = 64;  // made at once
  float factors[kFactors];
  const int64_t halves = w.group < kQuantizedBlock ? 2 : 1;  // groups of a part
  int64_t at = kFactors, group = 0;
  for (int64_t block = 0; block < blocks; block += together) {
    if (at == kFactors) {
      const int64_t made = w.groups - group < kFactors ? w.groups - group : kFactors;
      // Sums of high halves are not 16 times too large here.
      for (int64_t g = 0; g < made; ++g)
        factors[g] = factor_of(w, row, group + g, x_scales[group + g]) * (is_high ? 16.0f : 1.0f);
      group += made;
      at = 0;
    }
    // Numbers that the compiler knows: no loop.
    Sums sums =
        together == 2 && blocks - block > 1 ? Sums(bytes, whole, step, 2) : Sums(bytes, whole, step, 1);
    whole += together * step;
    if (bits == 4) {
      sums.low = _mm256_add_epi32(sums.low, load_256(starts));
      sums.high = _mm256_add_epi32(sums.high, load_256(starts + 8));
      starts += x.slab * kQuantizedLanes;
    }
    const __m256 low = _mm256_set1_ps(factors[at]), high = _mm256_set1_ps(factors[at + halves - 1]);
    lanes.low = _mm256_add_ps(lanes.low, _mm256_mul_ps(_mm256_cvtepi32_ps(sums.low), low));
    lanes.high = _mm256_add_ps(lanes.high, _mm256_mul_ps(_mm256_cvtepi32_ps(sums.high), high));
    at += halves;
  }
  return tree_of(lanes);
}

template <class Bytes>
float dot_of(const QuantizedWeight& w, int64_t row, Bytes bytes, const QuantizedColumns& x, int64_t t) {
  if (w.bits == 8) return dot_256<8, false>(w, row, bytes, x, t);
  return row % 2 == 0 ? dot_256<4, false>(w, row, bytes, x, t) : dot_256<4, true>(w, row, bytes, x, t);
}

// The next 32 columns of a row as signed bytes.
template <int bits, bool is_high, class Bytes>
WANDA_STEP inline __m256i levels_of(Bytes& row) {
  if constexpr (bits == 8) {
    const __m128i first = row.without_offset(), second = row.without_offset();
    return _mm256_set_m128i(second, first);
  } else {
    __m256i bytes = row.thirty_two();
    if (is_high) bytes = _mm256_srli_epi16(bytes, 4);
    return _mm256_sub_epi8(_mm256_and_si256(bytes, _mm256_set1_epi8(15)), _mm256_set1_epi8(8));
  }
}

// The upper halves, to nearest even, as bf16_of_float.
inline __m256i nearest_bf16(__m256 value) {
  const __m256i bits = _mm256_castps_si256(value);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i sum = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
  const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(value, value, _CMP_UNORD_Q));
  return _mm256_blendv_epi8(_mm256_srli_epi32(sum, 16), _mm256_set1_epi32(0x7fc0), is_nan);
}

// Sixteen elements, each the nearest to a value.
template <Dtype dtype>
WANDA_STEP inline void store_nearest(typename Element<dtype>::Bits* to, __m256 low, __m256 high) {
  if constexpr (dtype == Dtype::kFloat32) {
    _mm256_storeu_ps(reinterpret_cast<float*>(to), low);
    _mm256_storeu_ps(reinterpret_cast<float*>(to) + 8, high);
  } else if constexpr (dtype == Dtype::kFloat16) {
    store_256(to, _mm256_set_m128i(_mm256_cvtps_ph(high, _MM_FROUND_TO_NEAREST_INT),
                                   _mm256_cvtps_ph(low, _MM_FROUND_TO_NEAREST_INT)));
  } else {
    const __m256i both = _mm256_packus_epi32(nearest_bf16(low), nearest_bf16(high));
    store_256(to, _mm256_permute4x64_epi64(both, 0xd8));
  }
}

// 64 columns take 18 ns (int8) and 20 (int4) from the cache of a Zen 3, spread in memory and rounded by plain
// code 36.
template <Dtype dtype, int bits, bool is_high, class Bytes>
WANDA_PASS void unpack_bytes(const QuantizedWeight& w, int64_t row, Bytes bytes,
                             typename Element<dtype>::Bits* out) {
  const uint16_t* scales = w.scales + row * w.groups;
  const int64_t shift = w.groups == 1 ? 62 : __builtin_ctzll(static_cast<uint64_t>(w.group));
  for (int64_t col = 0; col < w.cols; col += 32) {
    if (col % kQuantizedBlock == 0) bytes.begin_block();
    const __m256i levels = levels_of<bits, is_high>(bytes);
    const __m256 scale = _mm256_set1_ps(float_of_bf16(scales[col >> shift]));
    const __m128i halves[2] = {_mm256_castsi256_si128(levels), _mm256_extracti128_si256(levels, 1)};
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
      const __m256 low = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(halves[i]));
      const __m256 high = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(halves[i], 8)));
      store_nearest<dtype>(out + col + 16 * i, _mm256_mul_ps(low, scale), _mm256_mul_ps(high, scale));
    }
  }
}

// f(the bytes of a row): OfBitmap, OfSparse24 or InPlace.
template <class F>
auto by_bytes(const QuantizedWeight& w, int64_t row, F f) {
  const __m128i gaps = _mm_set1_epi8(static_cast<char>(gap_of(w)));
  const uint8_t* values = quantized_values(w, row);
  if (w.codes == nullptr) return f(InPlace{values, gaps});
  const uint8_t* codes = w.codes + row * (w.cols / 8);
  if (w.starts != nullptr) return f(OfBitmap{{values, codes, gaps}});
  return f(OfSparse24{{values, codes, gaps}});
}

template <>
struct QuantizedSteps<Avx2> {
  static const uint8_t* expand(const QuantizedWeight& w, int64_t row, uint8_t* out) {
    return by_bytes(w, row, [&](auto bytes) { return in_columns(bytes, w.cols, out); });
  }

  static float dot(const QuantizedWeight& w, int64_t row, const uint8_t* stored, const QuantizedColumns& x,
                   int64_t t) {
    return dot_of(w, row, InPlace{stored, _mm_set1_epi8(static_cast<char>(gap_of(w)))}, x, t);
  }

  static float only_dot(const QuantizedWeight& w, int64_t row, const QuantizedColumns& x, uint8_t*) {
    return by_bytes(w, row, [&](auto bytes) { return dot_of(w, row, bytes, x, 0); });
  }

  template <Dtype dtype>
  static void unpack_row(const QuantizedWeight& w, int64_t row, typename Element<dtype>::Bits* out,
                         uint8_t*) {
    by_bytes(w, row, [&](auto bytes) {
      if (w.bits == 8) return unpack_bytes<dtype, 8, false>(w, row, bytes, out);
      if (is_high_half(w, row)) return unpack_bytes<dtype, 4, true>(w, row, bytes, out);
      unpack_bytes<dtype, 4, false>(w, row, bytes, out);
    });
  }
};

}  // namespace
}  // namespace wanda::cpu
