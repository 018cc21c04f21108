// Calls the kernel of the instruction set in use, and splits rows over threads.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>

#include "isa.h"

// WANDA_BY_ISA(rows)(params, begin, end) calls rows_avx512, rows_avx2 or rows_scalar.
#define WANDA_BY_ISA(kernel)                                                   \
  (::wanda::cpu::active_isa() == ::wanda::cpu::Isa::kAvx512 ? &kernel##_avx512 \
   : ::wanda::cpu::active_isa() == ::wanda::cpu::Isa::kAvx2 ? &kernel##_avx2   \
                                                            : &kernel##_scalar)

namespace wanda::cpu {

// A task below some tens of thousands of elements costs more to hand to a thread than to run.
inline int64_t grain_rows(int64_t cols) { return std::max<int64_t>(1, 32768 / std::max<int64_t>(1, cols)); }

}  // namespace wanda::cpu
