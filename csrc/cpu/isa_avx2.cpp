// The kernels with AVX2. See isa.h.
//
// The whole extension is built with one set of plain flags, so a file that needs an instruction set selects
// it after its includes. An inline function compiled there and chosen by the linker for the whole program
// would crash processors without these instructions. So every standard header and <immintrin.h> come before,
// and all that follows, bar the entry point, is in anonymous namespaces and uses no standard template.
#if defined(__x86_64__)

#include <immintrin.h>

#include <cstdint>
#include <cstring>
#include <new>

#include "convert.h"
#include "isa.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,bmi,bmi2,lzcnt,popcnt"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,bmi,bmi2,lzcnt,popcnt")
#endif

#include "levels_impl.h"
#include "pack_24_avx2.h"
#include "packed_avx2.h"
#include "product_sqnorm_impl.h"
#include "quantize_impl.h"
#include "quantized_avx2.h"
#include "refine_impl.h"
#include "rows_avx2.h"
#include "sqnorm_impl.h"

namespace wanda::cpu {

Kernels avx2_kernels() {
  return {&rows_run<Avx2>,
          &nm_run<Avx2>,
          &pack_24_run<Avx2>,
          &refine_run<Avx2>,
          &levels_run,
          &sqnorm_run<Avx2>,
          &product_sqnorm_run,
          &PackedSteps<Avx2>::layout,
          &PackedSteps<Avx2>::product,
          &PackedSteps<Avx2>::unpack,
          &quantized_round,
          &quantized_product<Avx2>,
          &quantized_unpack<Avx2>,
          &quantize_run<Avx2>,
          &exact_levels_run};
}

}  // namespace wanda::cpu

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif
