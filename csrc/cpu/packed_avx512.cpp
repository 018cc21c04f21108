// Packed sparse weights with AVX-512.
//
// bitmap: VPEXPANDW spreads 32 values (bf16), VEXPANDPS 16 (float32); VDPBF16PS multiplies and adds pairs in
// float32. From registers the two are fast on Zen 4, from memory they are microcode. Finding each lane's
// value by counting mask bits (VPOPCNTW, VPERMT2W) took 1.1 x as long. 2:4: x is permuted rather than the
// weights spread: 64 (bf16) or 32 (float32) columns in two registers, from which the indices pick those of 32
// (16) values. Half the products, none with a zero. float16 has no such product: the AVX2 kernels.
#include "packed.h"

#if defined(__x86_64__)

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "convert.h"
#include "target_avx512_packed_begin.h"

#include "packed_impl.h"

namespace wanda::cpu {
namespace {

// x stays in L1 while a group of rows passes: 64 rows by as many columns as take 24 KB of x. Eight rows of x
// and more stay in L2: their short segments would cost more than they save (1.2 x).
constexpr int64_t kRowGroup = 64;
constexpr int64_t column_bytes(int batch) { return batch <= 4 ? 24576 : 196608; }
// Bytes that values are prefetched ahead, to L2, where whole rows pass one after the other; else a row's next
// segment is. To L1 took 1.1-1.4 x as long, 4 KB ahead 1.1 x.
constexpr int64_t kAhead = 16384;

PackedLayout layout(PackedFormat format, Dtype dtype) {
  if (dtype == Dtype::kFloat16) return packed_avx2().layout(format, dtype);
  const bool bf16 = dtype == Dtype::kBFloat16;
  return {(bf16 ? 32 : 16) * (format == PackedFormat::kBitmap ? 1 : 2), !bf16};
}

// Columns [from, to) of a row.
struct Segment {
  const uint8_t* codes;  // of column 0
  int64_t from, to;
  int64_t ahead;  // bytes from a value to one that will be wanted
};

inline void prefetch(const void* values, int64_t ahead) {
  _mm_prefetch(static_cast<const char*>(values) + ahead, _MM_HINT_T1);
}

// Loads that the compiler does not join with the expansion.
inline __m512i loaded(const uint16_t* from) {
  __m512i value = _mm512_loadu_si512(from);
  asm("" : "+v"(value));
  return value;
}
inline __m512 loaded(const float* from) {
  __m512 value = _mm512_loadu_ps(from);
  asm("" : "+v"(value));
  return value;
}

// Each adds a segment's products to sums[0] .. sums[batch - 1] and returns where the row's next value is.

template <int batch>
const uint16_t* bitmap_bf16(const Segment segment, const uint16_t* next, const uint16_t* x, float* sums) {
  __m512 sum[batch];
  for (int b = 0; b < batch; ++b) sum[b] = _mm512_setzero_ps();
  for (int64_t j = segment.from; j < segment.to; j += 32) {
    uint32_t mask;
    std::memcpy(&mask, segment.codes + j / 8, sizeof(mask));
    const __m512i weight = _mm512_maskz_expand_epi16(mask, loaded(next));
    prefetch(next, segment.ahead);
    next += __builtin_popcount(mask);
    for (int b = 0; b < batch; ++b) {
      const __m512i column = _mm512_loadu_si512(x + (j * batch + 32 * b));
      sum[b] = _mm512_dpbf16_ps(sum[b], (__m512bh)weight, (__m512bh)column);
    }
  }
  for (int b = 0; b < batch; ++b) sums[b] += _mm512_reduce_add_ps(sum[b]);
  return next;
}

template <int batch>
const float* bitmap_float32(const Segment segment, const float* next, const float* x, float* sums) {
  __m512 sum[batch];
  for (int b = 0; b < batch; ++b) sum[b] = _mm512_setzero_ps();
  for (int64_t j = segment.from; j < segment.to; j += 16) {
    uint16_t mask;
    std::memcpy(&mask, segment.codes + j / 8, sizeof(mask));
    const __m512 weight = _mm512_maskz_expand_ps(mask, loaded(next));
    prefetch(next, segment.ahead);
    next += __builtin_popcount(mask);
    for (int b = 0; b < batch; ++b) {
      sum[b] = _mm512_fmadd_ps(weight, _mm512_loadu_ps(x + (j * batch + 16 * b)), sum[b]);
    }
  }
  for (int b = 0; b < batch; ++b) sums[b] += _mm512_reduce_add_ps(sum[b]);
  return next;
}

// For value i of 32 (bf16) or 16 (float32): the first column of its group, and where its two bits are.
struct alignas(64) Groups {
  uint16_t first_16[32];
  uint8_t shift_16[64];  // VPMULTISHIFTQB: one shift for each byte; a lane's upper byte is masked off
  uint32_t first_32[16];
  uint32_t shift_32[16];
  constexpr Groups() : first_16(), shift_16(), first_32(), shift_32() {
    for (uint32_t i = 0; i < 32; ++i) {
      first_16[i] = static_cast<uint16_t>(i / 2 * 4);
      shift_16[2 * i] = static_cast<uint8_t>(2 * i);
      if (i < 16) {
        first_32[i] = i / 2 * 4;
        shift_32[i] = 2 * i;
      }
    }
  }
};
constexpr Groups kGroups;
constexpr int kAndOr = 0xea;  // VPTERNLOG: (a & b) | c

template <int batch>
const uint16_t* sparse24_bf16(const Segment segment, const uint16_t* next, const uint16_t* x, float* sums) {
  const __m512i first = _mm512_load_si512(kGroups.first_16), shifts = _mm512_load_si512(kGroups.shift_16);
  const __m512i three = _mm512_set1_epi16(3);
  __m512 sum[batch];
  for (int b = 0; b < batch; ++b) sum[b] = _mm512_setzero_ps();
  for (int64_t j = segment.from; j < segment.to; j += 64, next += 32) {
    uint64_t indices;
    std::memcpy(&indices, segment.codes + j / 8, sizeof(indices));
    const __m512i spread =
        _mm512_multishift_epi64_epi8(shifts, _mm512_set1_epi64(static_cast<long long>(indices)));
    const __m512i pick = _mm512_ternarylogic_epi32(spread, three, first, kAndOr);
    const __m512i weight = _mm512_loadu_si512(next);
    prefetch(next, segment.ahead);
    for (int b = 0; b < batch; ++b) {
      const uint16_t* columns = x + (j * batch + 64 * b);
      const __m512i chosen =
          _mm512_permutex2var_epi16(_mm512_loadu_si512(columns), pick, _mm512_loadu_si512(columns + 32));
      sum[b] = _mm512_dpbf16_ps(sum[b], (__m512bh)weight, (__m512bh)chosen);
    }
  }
  for (int b = 0; b < batch; ++b) sums[b] += _mm512_reduce_add_ps(sum[b]);
  return next;
}

template <int batch>
const float* sparse24_float32(const Segment segment, const float* next, const float* x, float* sums) {
  const __m512i first = _mm512_load_si512(kGroups.first_32), shifts = _mm512_load_si512(kGroups.shift_32);
  const __m512i three = _mm512_set1_epi32(3);
  __m512 sum[batch];
  for (int b = 0; b < batch; ++b) sum[b] = _mm512_setzero_ps();
  for (int64_t j = segment.from; j < segment.to; j += 32, next += 16) {
    uint32_t indices;
    std::memcpy(&indices, segment.codes + j / 8, sizeof(indices));
    const __m512i spread = _mm512_srlv_epi32(_mm512_set1_epi32(static_cast<int>(indices)), shifts);
    const __m512i pick = _mm512_ternarylogic_epi32(spread, three, first, kAndOr);
    const __m512 weight = _mm512_loadu_ps(next);
    prefetch(next, segment.ahead);
    for (int b = 0; b < batch; ++b) {
      const float* columns = x + (j * batch + 32 * b);
      const __m512 chosen =
          _mm512_permutex2var_ps(_mm512_loadu_ps(columns), pick, _mm512_loadu_ps(columns + 16));
      sum[b] = _mm512_fmadd_ps(weight, chosen, sum[b]);
    }
  }
  for (int b = 0; b < batch; ++b) sums[b] += _mm512_reduce_add_ps(sum[b]);
  return next;
}

template <int batch, class T, const T* (*product_of)(Segment, const T*, const T*, float*)>
void by_segments(const PackedWeight& w, const T* x, float* sums, int64_t begin, int64_t end) {
  constexpr int64_t kBlock = column_bytes(batch) / (batch * static_cast<int64_t>(sizeof(T))) / 64 * 64;
  const T* const values = static_cast<const T*>(w.values);
  for (int64_t first = begin; first < end; first += kRowGroup) {
    const int64_t last = end - first < kRowGroup ? end : first + kRowGroup;
    const T* next[kRowGroup + 1];
    for (int64_t row = first; row < last; ++row) next[row - first] = values + packed_start(w, row);
    next[last - first] = next[last - first - 1];  // nothing to prefetch
    for (int64_t i = first * batch; i < last * batch; ++i) sums[i] = 0.0f;
    for (int64_t from = 0; from < w.cols; from += kBlock) {
      const int64_t to = w.cols - from < kBlock ? w.cols : from + kBlock;
      for (int64_t row = first; row < last; ++row) {
        const T*& at = next[row - first];
        const int64_t to_next_row =
            reinterpret_cast<const char*>(next[row - first + 1]) - reinterpret_cast<const char*>(at);
        const int64_t ahead = kBlock < w.cols ? to_next_row : kAhead;
        at = product_of(Segment{w.codes + row * (w.cols / 8), from, to, ahead}, at, x, sums + row * batch);
      }
    }
  }
}

void product(const PackedWeight& w, const void* x, int64_t batch, float* sums, int64_t begin, int64_t end) {
  if (w.dtype == Dtype::kFloat16) return packed_avx2().product(w, x, batch, sums, begin, end);
  packed_by_batch(batch, [&](auto constant) {
    constexpr int size = decltype(constant)::value;
    const bool bitmap = w.format == PackedFormat::kBitmap;
    if (w.dtype == Dtype::kBFloat16) {
      const auto* columns = static_cast<const uint16_t*>(x);
      return bitmap ? by_segments<size, uint16_t, &bitmap_bf16<size>>(w, columns, sums, begin, end)
                    : by_segments<size, uint16_t, &sparse24_bf16<size>>(w, columns, sums, begin, end);
    }
    const auto* columns = static_cast<const float*>(x);
    bitmap ? by_segments<size, float, &bitmap_float32<size>>(w, columns, sums, begin, end)
           : by_segments<size, float, &sparse24_float32<size>>(w, columns, sums, begin, end);
  });
}

// Loads of as many values as there are: 2:4 may end with the last one.
template <class T>
void unpack_rows(const PackedWeight& w, T* dense, int64_t begin, int64_t end) {
  const auto* values = static_cast<const T*>(w.values);
  for (int64_t row = begin; row < end; ++row) {
    const T* next = values + packed_start(w, row);
    const uint8_t* codes = w.codes + row * (w.cols / 8);
    T* out = dense + row * w.cols;
    for (int64_t j = 0; j < w.cols; j += 32) {
      uint32_t mask = 0;
      for (int i = 0; i < 4; ++i) mask |= packed_mask(w.format, codes[j / 8 + i]) << (8 * i);
      if constexpr (sizeof(T) == 2) {
        const __mmask32 count = _bzhi_u32(~0u, static_cast<uint32_t>(__builtin_popcount(mask)));
        _mm512_storeu_si512(out + j, _mm512_maskz_expand_epi16(mask, _mm512_maskz_loadu_epi16(count, next)));
        next += __builtin_popcount(mask);
      } else {
        for (int half = 0; half < 2; ++half) {
          const auto bits = static_cast<__mmask16>(mask >> (16 * half));
          const auto count =
              static_cast<__mmask16>(_bzhi_u32(~0u, static_cast<uint32_t>(__builtin_popcount(bits))));
          const __m512 spread = _mm512_maskz_expand_ps(bits, _mm512_maskz_loadu_ps(count, next));
          _mm512_storeu_ps(out + j + 16 * half, spread);
          next += __builtin_popcount(bits);
        }
      }
    }
  }
}

void unpack(const PackedWeight& w, void* dense, int64_t begin, int64_t end) {
  if (w.dtype == Dtype::kFloat32) return unpack_rows(w, static_cast<float*>(dense), begin, end);
  unpack_rows(w, static_cast<uint16_t*>(dense), begin, end);
}

}  // namespace

PackedKernels packed_avx512() { return {&layout, &product, &unpack}; }

}  // namespace wanda::cpu

#include "target_end.h"

#else

namespace wanda::cpu {

PackedKernels packed_avx512() { return packed_scalar(); }

}  // namespace wanda::cpu

#endif
