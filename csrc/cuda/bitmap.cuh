// Walks the elements of rows of a bitmap, four neighbours a thread: for bitmap_linear.cuh and
// unpack_packed.cuh.
//
// Algorithm: a warp takes pieces of 1024 columns, a lane one word of 32. Where a word's values begin is a sum
// of bits: over the row's pieces before (the block's warps tell each other), then over the words before, by a
// scan. Then in each of 8 steps the warp takes 128 columns, four a lane, so that values and x are read in the
// order of memory.
#pragma once

#include "block.cuh"
#include "score.cuh"

namespace wanda::cuda {

template <int kRows>
struct BitmapShared {
  uint32_t counts[2][kRows][kBitmapWarps];
};

// Four neighbouring elements: which of them are kept (the lowest bits of `bits`; those above are others'),
// and where the first that is has its value.
struct Quad {
  uint32_t bits, index;
};

// What is kept of four elements, +0 for the others.
template <class Bits>
WANDA_DEVICE void quad_values(const Bits* values, const Quad& quad, Bits (&element)[4]) {
  uint32_t next = quad.index;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    element[i] = 0;
    if (quad.bits >> i & 1) element[i] = __ldg(values + next++);
  }
}

// visit(column, quads): this lane's columns from `column` on in each of kRows rows of the block's. All
// threads of the block call it, and all lanes of a warp visit together: past the row's end nothing is kept.
// Rows past the weight's last are its last again.
template <int kRows, class Visit>
WANDA_DEVICE void walk_bitmap(const PackedWeight& weight, int64_t first_row, BitmapShared<kRows>& shared,
                              Visit visit) {
  const int warps = static_cast<int>(blockDim.x) / kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
  const int lane = lane_of(threadIdx.x);
  // Not worked out again in each step, as the compiler would to save a register.
  const uint32_t shift = opaque(4 * lane % kWarp), below = opaque((1u << 4 * lane % kWarp) - 1);
  const uint32_t words_in_row = static_cast<uint32_t>(weight.cols / kWarp);
  const uint32_t* bits[kRows];
  uint32_t begin[kRows];  // where the values of this round's pieces begin
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const int64_t row = min(first_row + r, weight.rows - 1);
    bits[r] = reinterpret_cast<const uint32_t*>(weight.codes) + row * words_in_row;
    begin[r] = static_cast<uint32_t>(__ldg(weight.starts + row));
  }
  const uint32_t pieces = (words_in_row + kWarp - 1) / kWarp, rounds = (pieces + warps - 1) / warps;
  for (uint32_t round = 0; round < rounds; ++round) {
    const uint32_t first_word = (round * warps + warp) * kWarp;
    uint32_t word[kRows], offset[kRows];
    uint32_t (*const counts)[kBitmapWarps] = shared.counts[round & 1];  // the other half may still be read
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      word[r] = first_word + lane < words_in_row ? __ldg(bits[r] + first_word + lane) : 0;
      const uint32_t own = __popc(word[r]);
      uint32_t through = own;
#pragma unroll
      for (int step = 1; step < kWarp; step *= 2) {
        const uint32_t other = __shfl_up_sync(kFullMask, through, step);
        if (lane >= step) through += other;
      }
      offset[r] = through - own;
      if (lane == kWarp - 1) counts[r][warp] = through;
    }
    __syncthreads();
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      offset[r] += begin[r];
      for (int w = 0; w < warps; ++w) {
        const uint32_t count = counts[r][w];
        if (w < warp) offset[r] += count;
        begin[r] += count;
      }
    }
    if (first_word >= words_in_row) continue;
    const uint32_t steps = min((words_in_row - first_word + 3) / 4, 8u);
#pragma unroll 2
    for (uint32_t step = 0; step < steps; ++step) {
      Quad quads[kRows];
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const uint32_t source = 4 * step + lane / 8;
        const uint32_t own = __shfl_sync(kFullMask, word[r], source);
        const uint32_t begins = __shfl_sync(kFullMask, offset[r], source);
        quads[r] = {own >> shift, begins + __popc(own & below)};
      }
      visit((first_word + 4 * step) * kWarp + 4 * lane, quads);
    }
  }
}

}  // namespace wanda::cuda
