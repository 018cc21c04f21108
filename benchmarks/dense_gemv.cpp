// The best dense bf16 matrix-vector product that we could write: the peer of benchmarks/operators.py that
// torch is not. Eight accumulators, whole rows, the next row prefetched. Built with -march=native; needs
// AVX-512 BF16.
#include <immintrin.h>

#include <cstdint>

extern "C" void dense_gemv(const uint16_t* w, const uint16_t* x, float* y, int64_t rows, int64_t cols,
                           int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t row = 0; row < rows; ++row) {
    const uint16_t* weight = w + row * cols;
    __m512 sum[8];
    for (auto& s : sum) s = _mm512_setzero_ps();
    int64_t j = 0;
    for (; j + 256 <= cols; j += 256) {
      for (int i = 0; i < 8; ++i) {
        const __m512i a = _mm512_loadu_si512(weight + j + 32 * i);
        _mm_prefetch(reinterpret_cast<const char*>(weight + j + 32 * i) + 16384, _MM_HINT_T1);
        const __m512i b = _mm512_loadu_si512(x + j + 32 * i);
        sum[i] = _mm512_dpbf16_ps(sum[i], (__m512bh)a, (__m512bh)b);
      }
    }
    for (; j < cols; j += 32) {
      const __m512i a = _mm512_loadu_si512(weight + j), b = _mm512_loadu_si512(x + j);
      sum[0] = _mm512_dpbf16_ps(sum[0], (__m512bh)a, (__m512bh)b);
    }
    for (int i = 1; i < 8; ++i) sum[0] = _mm512_add_ps(sum[0], sum[i]);
    y[row] = _mm512_reduce_add_ps(sum[0]);
  }
}
