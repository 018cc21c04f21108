// As plan.h, for packed weights with values of 8 or 4 bits (quantized.cuh, quantized_linear.cuh): a block
// takes four rows, a warp of it 512 columns at a time.
#pragma once

#include "plan.h"

namespace wanda::cuda {

enum class QuantizedForm : int { kBitmap, kSparse24, kDense };

constexpr int kQuantizedRows = 4, kQuantizedCols = 512;
constexpr int kQuantizedWarps = 8;        // at most in a block
constexpr int64_t kQuantizedTokens = 16;  // more go through the unpacked weight, of experts on average
constexpr int kRoundThreads = 1024;       // at most, for a group of a row of x

// Of a bitmap: the words of a stage, and its values of each row with what aligns them.
constexpr int kQuantizedRowBytes = kQuantizedCols + 32;
constexpr int kQuantizedStageBytes = kWarp * 16 + kQuantizedRows * kQuantizedRowBytes;

inline QuantizedForm form_of(const QuantizedWeight& weight) {
  return weight.starts != nullptr  ? QuantizedForm::kBitmap
         : weight.codes != nullptr ? QuantizedForm::kSparse24
                                   : QuantizedForm::kDense;
}

struct QuantizedPlan {
  int room;        // tokens at a time: 1, 4 or 8
  int share;       // of a warp, in times 512 columns
  int ring_bytes;  // of a warp's stages of a bitmap: two, or one where it has nothing more to copy
  int threads;
};

inline QuantizedPlan quantized_plan(const QuantizedWeight& weight, int64_t tokens, int64_t most_warps) {
  const int64_t items = divide_up(weight.cols, kQuantizedCols), share = divide_up(items, most_warps);
  const int stages = form_of(weight) != QuantizedForm::kBitmap ? 0 : share == 1 ? 1 : 2;
  return {tokens == 1   ? 1
          : tokens <= 4 ? 4
                        : 8,
          static_cast<int>(share), stages * kQuantizedStageBytes,
          static_cast<int>(divide_up(items, share) * kWarp)};
}

// What a warp begins and ends with costs as much as 512 of its columns: as few warps, a power of two, as
// leave each processor sixteen. Experts: as experts_room.
inline QuantizedPlan plan_quantized(const QuantizedLinearParams& params, const Device& device) {
  const int64_t at_work = std::min(params.experts, params.tokens);
  const int64_t blocks = divide_up(params.weight.rows / params.experts, kQuantizedRows) * at_work;
  int64_t warps = 1;
  while (warps < kQuantizedWarps && warps * blocks < 16LL * device.processors) warps *= 2;
  return quantized_plan(params.weight,
                        params.ends == nullptr ? params.tokens : divide_up(2 * params.tokens, params.experts),
                        warps);
}

// Sums of each warp, then their stages.
inline int64_t quantized_shared_bytes(const QuantizedPlan& plan) {
  return plan.threads / kWarp * (int64_t{kQuantizedRows} * plan.room * 4 + plan.ring_bytes);
}

}  // namespace wanda::cuda
