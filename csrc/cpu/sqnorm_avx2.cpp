// Column sums of squares with AVX2. See sqnorm_impl.h.
#include "sqnorm.h"

#if defined(__x86_64__)

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "convert.h"
#include "target_avx2_begin.h"

#include "sqnorm_impl.h"

namespace wanda::cpu {
namespace {

struct SqnormLanesAvx2 {
  static constexpr int64_t kUnit = 16;

  static __m256 add_square(__m256 sum, __m256 value) {
    return _mm256_add_ps(sum, _mm256_mul_ps(value, value));
  }

  template <Dtype dtype, int count, class T>
  static void add(const T* const* rows, int64_t column, int64_t cols, float* partial) {
    for (int64_t j = 0; j < cols; j += kUnit) {
      __m256 first = _mm256_load_ps(partial + j);
      __m256 second = _mm256_load_ps(partial + j + 8);
      for (int r = 0; r < count; ++r) {
        const T* x = rows[r] + column + j;
        _mm_prefetch(reinterpret_cast<const char*>(rows[r + count] + column + j), _MM_HINT_T1);
        if constexpr (dtype == Dtype::kFloat32) {
          first = add_square(first, _mm256_loadu_ps(reinterpret_cast<const float*>(x)));
          second = add_square(second, _mm256_loadu_ps(reinterpret_cast<const float*>(x + 8)));
        } else if constexpr (dtype == Dtype::kFloat16) {
          first = add_square(first, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x))));
          second =
              add_square(second, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x + 8))));
        } else {
          // Even columns to `first`, odd columns to `second`: two cheap operations where widening in order
          // takes two shuffles more.
          const __m256i pairs = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x));
          first = add_square(first, _mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16)));
          second = add_square(second, _mm256_castsi256_ps(_mm256_and_si256(
                                          pairs, _mm256_set1_epi32(static_cast<int>(0xffff0000u)))));
        }
      }
      _mm256_store_ps(partial + j, first);
      _mm256_store_ps(partial + j + 8, second);
    }
  }

  template <Dtype dtype>
  static int64_t position(int64_t j) {
    return dtype == Dtype::kBFloat16 ? j / 16 * 16 + j % 2 * 8 + j % 16 / 2 : j;
  }
};

}  // namespace

void sqnorm_avx2(const SqnormParams& params, int64_t sequence, int64_t begin, int64_t end) {
  sqnorm_run<SqnormLanesAvx2>(params, sequence, begin, end);
}

}  // namespace wanda::cpu

#include "target_end.h"

#else

namespace wanda::cpu {

void sqnorm_avx2(const SqnormParams& params, int64_t sequence, int64_t begin, int64_t end) {
  sqnorm_scalar(params, sequence, begin, end);
}

}  // namespace wanda::cpu

#endif
