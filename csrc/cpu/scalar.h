// No instruction set: plain loops that compilers vectorise for whatever the build's flags allow.
#pragma once

#include "convert.h"

// All operators for a set are one translation unit, too large for GCC's limits on inlining to leave hot loops
// as they are written. A pass over a row or a block is a function of its own; the steps inside its loop are
// not.
#define WANDA_PASS __attribute__((noinline))
#define WANDA_STEP __attribute__((always_inline))

namespace wanda::cpu {
namespace {

struct Scalar {
  static constexpr int kLanes = 1;   // float32 in a register; 1: none
  static constexpr int kBytes = 16;  // of vectors of GCC's and Clang's extension
};

#if defined(__x86_64__)
// Inlined at once, or GCC finds that it does nothing and drops the call.
WANDA_STEP inline void prefetch_l2(const void* at) {
  _mm_prefetch(static_cast<const char*>(at), _MM_HINT_T1);
}
#endif

// Where Vector::load_pair puts column `column` of those it takes: bfloat16's even ones into the first
// register.
template <class Vector, Dtype dtype>
constexpr int64_t place_in_pair(int64_t column) {
  constexpr int64_t kLanes = Vector::kLanes, kPair = 2 * kLanes;
  if (dtype != Dtype::kBFloat16 || kLanes == 1) return column;
  return column / kPair * kPair + column % 2 * kLanes + column % kPair / 2;
}

}  // namespace
}  // namespace wanda::cpu
