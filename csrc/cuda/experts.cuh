// Products with a stack of experts' weights: what a block multiplies.
//
// Algorithm: bitmap_linear.cuh's or sparse24_linear.cuh's, of one expert's weight and its rows of x. The grid
// is experts x blocks of a weight's rows. A block looks up where its expert's rows of x begin and end, and is
// done where there are none: what an idle expert costs is two loads a block. Rows beyond those that a launch
// has room for are taken in turns, each of which reads the block's weights again, by then from L2.
//
// Assumes: as those. `ends` may hold anything: rows outside of x are nobody's.
//
// Bytes: values and codes of the experts that have rows, once a turn.
#pragma once

#include "block.cuh"

namespace wanda::cuda {

// multiply(params, block) for each turn of this block: `block` of those of the expert's weight.
template <Dtype kDtype, class Multiply>
WANDA_DEVICE void each_turn(const PackedExpertsParams& params, uint32_t blocks, int room, Multiply multiply) {
  constexpr int64_t kSize = sizeof(typename Element<kDtype>::Bits);
  const uint32_t expert = blockIdx.x / blocks, block = blockIdx.x % blocks;
  const int32_t last = static_cast<int32_t>(params.tokens);
  int32_t begin = expert == 0 ? 0 : max(__ldg(params.ends + expert - 1), 0);
  const int32_t end = min(__ldg(params.ends + expert), last);
  PackedLinearParams own{params.stack, nullptr, nullptr, nullptr, 0};
  const int64_t rows = params.stack.rows / params.experts, cols = params.stack.cols, first = expert * rows;
  own.weight.rows = rows;
  own.weight.codes += first * (cols / 8);
  if (own.weight.starts != nullptr) {
    own.weight.starts += first;
  } else {
    own.weight.values = static_cast<const char*>(own.weight.values) + first * (cols / 2) * kSize;
  }
#pragma unroll 1
  while (begin < end) {
    own.tokens = min(end - begin, room);
    own.x = static_cast<const char*>(params.x) + begin * cols * kSize;
    own.y = static_cast<char*>(params.y) + begin * rows * kSize;
    multiply(own, block);
    begin += room;
    if (begin < end) __syncthreads();  // the sums of this turn have been read
  }
}

}  // namespace wanda::cuda
