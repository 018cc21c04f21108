// Levels chosen one column of a block after the other. Included by isa_<set>.cpp, for whose set compilers
// vectorise it; one thread, one tile of rows.
//
// A tile's rows lie together for a column, so that every loop over them is one over the lanes of registers. A
// column's slope takes what the block's earlier columns have moved when its turn comes: sums stay in
// registers, and only what was moved is read.
#pragma once

#include "isa.h"
#include "scalar.h"

namespace wanda::cpu {
namespace {

// slope[r] += the sum over k < count of gram[k] * moved[k, r].
WANDA_STEP inline void add_moved(float* __restrict slope, const float* __restrict gram,
                                 const float* __restrict moved, int64_t count) {
  float sums[kLevelsRows];  // 6 registers of AVX-512
  for (int64_t r = 0; r < kLevelsRows; ++r) sums[r] = slope[r];
  for (int64_t k = 0; k < count; ++k) {
    const float g = gram[k];
    for (int64_t r = 0; r < kLevelsRows; ++r) sums[r] += g * moved[k * kLevelsRows + r];
  }
  for (int64_t r = 0; r < kLevelsRows; ++r) slope[r] = sums[r];
}

inline void levels_run(const LevelsBlock& b) {
  alignas(64) float moved[kLevelsColumns * kLevelsRows];
  for (int64_t c = 0; c < b.cols; ++c) {
    float* __restrict slope = b.slope + c * kLevelsRows;
    add_moved(slope, b.gram + c * b.gram_stride, moved, c);
    const int64_t group = (b.first + c) / b.group * kLevelsRows;
    const float* __restrict step = b.steps + group;
    const float* __restrict per_step = b.per_step + group;
    const float* __restrict target = b.target + c * kLevelsRows;
    float* __restrict level = b.levels + c * kLevelsRows;
    float* __restrict difference = b.difference + c * kLevelsRows;
    float* __restrict change = moved + c * kLevelsRows;
    const float per_square = b.per_square[c], extra = b.extra[c], least = -b.most, largest = b.most - 1;
    for (int64_t r = 0; r < kLevelsRows; ++r) {
      const float was = difference[r];
      float best = level[r] - (slope[r] + extra * was) * per_square * per_step[r];
      best = best < least ? least : best;
      best = best > largest ? largest : best;
      best = (best + kStepOf1) - kStepOf1;  // to a whole number
      best = target[r] == 0 ? 0 : best;
      best = step[r] == 0 ? 0 : best;
      const float now = best * step[r] - target[r];
      level[r] = best;
      difference[r] = now;
      change[r] = now - was;
    }
  }
}

}  // namespace
}  // namespace wanda::cpu
