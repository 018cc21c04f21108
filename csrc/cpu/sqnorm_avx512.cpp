// Column sums of squares with AVX-512. See sqnorm_impl.h.
#include "sqnorm.h"

#if defined(__x86_64__)

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "convert.h"
#include "target_avx512_begin.h"

#include "sqnorm_impl.h"

namespace wanda::cpu {
namespace {

struct SqnormLanesAvx512 {
  static constexpr int64_t kUnit = 32;

  static __m512 add_square(__m512 sum, __m512 value) {
    return _mm512_add_ps(sum, _mm512_mul_ps(value, value));
  }

  template <Dtype dtype, int count, class T>
  static void add(const T* const* rows, int64_t column, int64_t cols, float* partial) {
    for (int64_t j = 0; j < cols; j += kUnit) {
      __m512 first = _mm512_load_ps(partial + j);
      __m512 second = _mm512_load_ps(partial + j + 16);
      for (int r = 0; r < count; ++r) {
        const T* x = rows[r] + column + j;
        _mm_prefetch(reinterpret_cast<const char*>(rows[r + count] + column + j), _MM_HINT_T1);
        if constexpr (dtype == Dtype::kFloat32) {
          first = add_square(first, _mm512_loadu_ps(x));
          second = add_square(second, _mm512_loadu_ps(x + 16));
        } else if constexpr (dtype == Dtype::kFloat16) {
          first = add_square(first, _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x))));
          second = add_square(second,
                              _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + 16))));
        } else {
          // Even columns to `first`, odd columns to `second`: two cheap operations where widening in order
          // takes two shuffles more.
          const __m512i pairs = _mm512_loadu_si512(x);
          first = add_square(first, _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16)));
          second = add_square(second, _mm512_castsi512_ps(_mm512_and_si512(
                                          pairs, _mm512_set1_epi32(static_cast<int>(0xffff0000u)))));
        }
      }
      _mm512_store_ps(partial + j, first);
      _mm512_store_ps(partial + j + 16, second);
    }
  }

  template <Dtype dtype>
  static int64_t position(int64_t j) {
    return dtype == Dtype::kBFloat16 ? j / 32 * 32 + j % 2 * 16 + j % 32 / 2 : j;
  }
};

}  // namespace

void sqnorm_avx512(const SqnormParams& params, int64_t sequence, int64_t begin, int64_t end) {
  sqnorm_run<SqnormLanesAvx512>(params, sequence, begin, end);
}

}  // namespace wanda::cpu

#include "target_end.h"

#else

namespace wanda::cpu {

void sqnorm_avx512(const SqnormParams& params, int64_t sequence, int64_t begin, int64_t end) {
  sqnorm_scalar(params, sequence, begin, end);
}

}  // namespace wanda::cpu

#endif
