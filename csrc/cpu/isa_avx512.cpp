// The kernels with AVX-512. See isa.h, and isa_avx2.cpp for what may stand in this file.
#if defined(__x86_64__)

#if !defined( \
    __clang__)  // GCC 12 takes the undefined sources inside its own intrinsics for a bug (GCC bug 105593).
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>

#include <cstdint>
#include <cstring>
#include <new>

#include "convert.h"
#include "isa.h"

#if defined(__clang__)
#pragma clang attribute push(                                                                        \
    __attribute__((                                                                                  \
        target("avx2,fma,f16c,bmi,bmi2,lzcnt,popcnt,avx512f,avx512bw,avx512cd,avx512dq,avx512vl"))), \
    apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,bmi,bmi2,lzcnt,popcnt,avx512f,avx512bw,avx512cd,avx512dq,avx512vl")
#endif

#include "levels_impl.h"
#include "pack_24_avx512.h"
#include "product_sqnorm_impl.h"
#include "quantize_impl.h"
#include "refine_impl.h"
#include "rows_avx512.h"
#include "sqnorm_impl.h"

namespace wanda::cpu {

void add_packed_avx512(Kernels& kernels);     // packed_avx512.cpp
void add_quantized_avx512(Kernels& kernels);  // quantized_avx512.cpp

Kernels avx512_kernels() {
  Kernels kernels = avx2_kernels();
  kernels.rows = &rows_run<Avx512>;
  kernels.nm = &nm_run<Avx512>;
  kernels.pack_24 = &pack_24_run<Avx512>;
  kernels.refine = &refine_run<Avx512>;
  kernels.levels = &levels_run;
  kernels.sqnorm = &sqnorm_run<Avx512>;
  kernels.product_sqnorm = &product_sqnorm_run;
  kernels.quantize = &quantize_run<Avx512>;
  kernels.exact_levels = &exact_levels_run;
  if (__builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vbmi2") &&
      __builtin_cpu_supports("avx512bf16")) {
    add_packed_avx512(kernels);
  }
  if (__builtin_cpu_supports("avx512vbmi2") && __builtin_cpu_supports("avx512vnni")) {
    add_quantized_avx512(kernels);
  }
  return kernels;
}

}  // namespace wanda::cpu

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif
