// Sums and searches of a whole block. Every thread gets the result. Sums run in a fixed order: lanes by a
// butterfly, then warps by a butterfly, whatever the schedule.
#pragma once

#include "platform.cuh"

namespace wanda::cuda {

WANDA_DEVICE int lane_of(int thread) { return thread & (kWarp - 1); }

// Lane i gets the warp's sum of value[i % kCount], kCount a power of two up to 32; overwrites `value`. At
// each step a lane gives away the half of its sums that its partner keeps. Steps are template arguments: as a
// loop, nvcc 13.0 kept 16 values in local memory.
template <int kCount, int kStep = 1>
WANDA_DEVICE float warp_sums(float (&value)[kCount]) {
  const int lane = static_cast<int>(threadIdx.x) & (kWarp - 1);
  if constexpr (kStep < kCount) {
#pragma unroll
    for (int i = 0; i < kCount / 2 / kStep; ++i) {
      const float even = value[2 * i], odd = value[2 * i + 1];
      const float other = __shfl_xor_sync(kFullMask, lane & kStep ? even : odd, kStep);
      value[i] = (lane & kStep ? odd : even) + other;
    }
  } else {
    value[0] += __shfl_xor_sync(kFullMask, value[0], kStep);
  }
  if constexpr (2 * kStep < kWarp) return warp_sums<kCount, 2 * kStep>(value);
  return value[0];
}

// `slots` [32] in shared memory. One barrier, between the writes and the reads: the caller sees to it that
// another barrier passes before the slots are written again.
WANDA_DEVICE uint32_t block_sum(uint32_t value, uint32_t* slots) {
  const int lane = lane_of(threadIdx.x);
  value = __reduce_add_sync(kFullMask, value);
  if (lane == 0) slots[threadIdx.x / kWarp] = value;
  __syncthreads();
  return __reduce_add_sync(kFullMask, lane < static_cast<int>(blockDim.x) / kWarp ? slots[lane] : 0);
}

// As block_sum.
WANDA_DEVICE uint32_t block_max(uint32_t value, uint32_t* slots) {
  const int lane = lane_of(threadIdx.x);
  value = __reduce_max_sync(kFullMask, value);
  if (lane == 0) slots[threadIdx.x / kWarp] = value;
  __syncthreads();
  return __reduce_max_sync(kFullMask, lane < static_cast<int>(blockDim.x) / kWarp ? slots[lane] : 0);
}

struct Bin {
  uint32_t index;
  uint32_t below;  // entries in the bins before it
  uint32_t size;   // entries in it
};

// The bin of the entry of rank `rank` (from 0) of 32 * kPerLane bins. Each warp searches for itself, which
// spares a barrier.
template <int kPerLane>
WANDA_DEVICE Bin find_bin(const uint32_t* bins, uint32_t rank) {
  static_assert(kPerLane % 4 == 0, "bins are read four at a time");
  const int lane = lane_of(threadIdx.x);
  uint32_t own = 0;
#pragma unroll
  for (int i = 0; i < kPerLane; i += 4) {
    const uint4 four = *reinterpret_cast<const uint4*>(bins + lane * kPerLane + i);
    own += four.x + four.y + four.z + four.w;
  }
  uint32_t through = own;
#pragma unroll
  for (int step = 1; step < kWarp; step *= 2) {
    const uint32_t other = __shfl_up_sync(kFullMask, through, step);
    if (lane >= step) through += other;
  }
  const int owner = __ffs(__ballot_sync(kFullMask, through > rank)) - 1;
  Bin found{static_cast<uint32_t>(owner * kPerLane), __shfl_sync(kFullMask, through - own, owner), 0};
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    found.size = bins[found.index];
    if (i == kPerLane - 1 || found.below + found.size > rank) break;
    found.below += found.size;
    ++found.index;
  }
  return found;
}

// The value of rank `rank` (from 0) among value_at(0), ..., value_at(count - 1), all different: a radix
// descent of eight bits a step from bit `top_shift`. `bins` [256] in shared memory.
template <class ValueAt>
WANDA_DEVICE uint64_t radix_select(ValueAt value_at, int64_t count, uint32_t rank, int top_shift,
                                   uint32_t* bins) {
  uint64_t prefix = 0;
  for (int shift = top_shift; shift >= 0; shift -= 8) {
    for (int i = threadIdx.x; i < 256; i += blockDim.x) bins[i] = 0;
    __syncthreads();
    for (int64_t i = threadIdx.x; i < count; i += blockDim.x) {
      const uint64_t value = value_at(i);
      if (shift == top_shift || value >> (shift + 8) == prefix >> (shift + 8)) {
        atomicAdd(&bins[(value >> shift) & 255], 1u);
      }
    }
    __syncthreads();
    const Bin bin = find_bin<8>(bins, rank);
    rank -= bin.below;
    prefix |= static_cast<uint64_t>(bin.index) << shift;
    __syncthreads();
  }
  return prefix;
}

}  // namespace wanda::cuda
