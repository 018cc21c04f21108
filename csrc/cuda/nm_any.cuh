// N:M selection for any M up to 32 and any alignment: what nm.cuh does not take.
//
// Algorithm: group.cuh's, on groups filled up to kM elements with scores that are never among the smallest.
//
// Assumes: 2 <= M <= kM, blockDim.x <= kNmAnyThreads.
//
// One thread: one group of a tile. A tile is blockDim.x groups of one row; it waits in shared memory, where a
// thread finds its group, of whatever width, and from where it leaves in the order of its bytes.
//
// Bytes: W in once and out once, 16 a lane but for what lies before the first and after the last whole 16
// bytes of a tile. Shared memory has the misalignment of the tile in device memory.
#pragma once

#include "group.cuh"
#include "rows_any.cuh"  // write_sums

namespace wanda::cuda {

// `count` elements from `global` on, and their place in shared memory: `buffer`, aligned to 16 bytes, with
// room for count + kChunk elements.
template <class T>
struct Tile {
  static constexpr int kChunk = 16 / sizeof(T);

  T* shared;
  const T* global;
  int head, chunks, count;  // elements before the first whole 16 bytes; how many of those

  WANDA_DEVICE Tile(T* buffer, const T* first, int elements) {
    const int skipped = static_cast<int>(reinterpret_cast<uintptr_t>(first) % 16 / sizeof(T));
    shared = buffer + skipped;
    global = first;
    count = elements;
    head = min((kChunk - skipped) % kChunk, count);
    chunks = (count - head) / kChunk;
  }

  WANDA_DEVICE void load() const {
    for (int c = threadIdx.x; c < chunks; c += blockDim.x) {
      *reinterpret_cast<uint4*>(shared + head + c * kChunk) = load_16(global + head + c * kChunk);
    }
    load_ends();
  }
  // `to`: the address that the tile was made for.
  WANDA_DEVICE void store(T* to) const {
    for (int c = threadIdx.x; c < chunks; c += blockDim.x) {
      const uint4 chunk = *reinterpret_cast<const uint4*>(shared + head + c * kChunk);
      store_16(to + head + c * kChunk, chunk.x, chunk.y, chunk.z, chunk.w);
    }
    store_ends(to);
  }

  // The end that element `i` of both is in: the head, then what follows the last whole 16 bytes.
  WANDA_DEVICE int end_at(int i) const { return i < head ? i : i + chunks * kChunk; }
  WANDA_DEVICE void load_ends() const {
    for (int i = threadIdx.x; i < count - chunks * kChunk; i += blockDim.x)
      shared[end_at(i)] = global[end_at(i)];
  }
  WANDA_DEVICE void store_ends(T* to) const {
    for (int i = threadIdx.x; i < count - chunks * kChunk; i += blockDim.x) to[end_at(i)] = shared[end_at(i)];
  }
};

template <Dtype kDtype, int kM>
struct NmAnyShared {
  static constexpr int kElements = kNmAnyThreads * kM;
  alignas(16) typename Element<kDtype>::Bits weight[kElements + Element<kDtype>::kChunk];
  alignas(16) float norm[kElements + 4];
  alignas(16) bool mask[kElements + 16];
  float slots[2 * kWarp];
};

template <Dtype kDtype, int kM>
__global__ void __launch_bounds__(kNmAnyThreads) nm_any_kernel(const NmParams params) {
  using Bits = typename Element<kDtype>::Bits;
  WANDA_DYNAMIC_SHARED(memory);
  NmAnyShared<kDtype, kM>& shared = *reinterpret_cast<NmAnyShared<kDtype, kM>*>(memory);
  const int m = static_cast<int>(params.m);
  const int64_t tile_cols = int64_t{blockDim.x} * m;
  const float* const norm = norm_at(params, 0);
  const int64_t first_row = first_row_of(params);
  for (int64_t row = first_row + blockIdx.x; row < first_row + params.norm_rows; row += gridDim.x) {
    Bits* const weight = static_cast<Bits*>(params.weight) + row * params.row_stride;
    ScoreSums sums[1];
    for (int64_t first = 0; first < params.cols; first += tile_cols) {
      const int cols = static_cast<int>(min(tile_cols, params.cols - first));
      const Tile<Bits> weights(shared.weight, weight + first, cols);
      const Tile<float> norms(shared.norm, norm + first, cols);
      bool* const mask = params.mask == nullptr ? nullptr : params.mask + row * params.cols + first;
      const Tile<bool> masks(shared.mask, mask, cols);
      weights.load();
      norms.load();
      __syncthreads();
      const int own = static_cast<int>(threadIdx.x) * m;
      if (own < cols) {
        float score[kM];
        uint32_t signs = 0;
#pragma unroll
        for (int i = 0; i < kM; ++i) {
          score[i] = __uint_as_float(0x7fffffffu);  // the largest there is, and last among equals
          if (i >= m) continue;
          const float one = norms.shared[own + i];
          signs |= __float_as_uint(one);
          score[i] = score_of<kDtype>(weights.shared[own + i], one);
        }
        uint32_t flag[kM];  // bit 31: stays
        select_groups<kM, 0>(score, static_cast<uint32_t>(params.n) + kM - m, signs >> 31 != 0, flag);
#pragma unroll
        for (int i = 0; i < kM; ++i) {
          if (i >= m) continue;
          const bool is_pruned = flag[i] >> 31 == 0;
          const float square = __fmul_rn(score[i], score[i]);
          sums[0].all = __fadd_rn(sums[0].all, square);
          sums[0].pruned = __fadd_rn(sums[0].pruned, is_pruned ? square : 0.0f);
          if (mask != nullptr) {
            masks.shared[own + i] = is_pruned;
          } else if (is_pruned) {
            weights.shared[own + i] = 0;
          }
        }
      }
      __syncthreads();
      if (mask != nullptr) {
        masks.store(mask);
      } else {
        weights.store(weight + first);
      }
      __syncthreads();  // the next tile takes this one's place
    }
    if (params.score_sums != nullptr) write_sums(sums, 1, params.score_sums + 2 * row, shared.slots);
  }
}

}  // namespace wanda::cuda
