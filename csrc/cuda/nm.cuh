// N:M selection: zero (or mark) the M - N smallest |W| * norm of every M columns.
//
// Algorithm: all pairs of a group are compared by one subtraction each, and the outcomes counted bit-parallel
// (group.cuh): 9 SASS instructions an element for 2:4 and 16 for 4:8, bf16.
//
// Assumes: a block's rows are of one matrix, blockIdx.y; M of 2, 4, 8, 16 or 32; 16-byte aligned rows, norms
// and mask rows, whole units. Other M up to 32 and other rows go to nm_any.cuh, greater groups to
// rows_any.cuh, each as a row of its own.
//
// One thread: a unit of at least 16 bytes of what it writes and of M elements in each of kNmRows rows,
// then the unit blockDim.x further on. The norms of a unit are loaded once for all of its rows: one byte an
// element rather than four.
//
// Bytes: W in once and out once, 16 a lane. A unit of a mask is 16 elements, two or four chunks that a lane
// loads one after the other: the second finds its sectors in L1.
#pragma once

#include "group.cuh"
#include "rows_any.cuh"  // write_sums

namespace wanda::cuda {

template <int kM, Output kOutput>
constexpr int kNmRows = nm_rows(kM, kOutput);

template <Dtype kDtype, int kM, int kKept, Output kOutput>
struct NmUnit {
  using Bits = typename Element<kDtype>::Bits;
  static constexpr int kChunk = Element<kDtype>::kChunk;
  static constexpr int kWidth = nm_width(kDtype, kM, kOutput);
  static constexpr int kChunks = kWidth / kChunk;

  float4 norms[kWidth / 4];
  bool any_sign;

  WANDA_DEVICE void load_norms(const float* norm) {
    uint32_t signs = 0;
#pragma unroll
    for (int i = 0; i < kWidth / 4; ++i) {
      norms[i] = __ldg(reinterpret_cast<const float4*>(norm) + i);
      signs |= sign_bits(norms[i]);
    }
    any_sign = signs >> 31 != 0;
  }

  WANDA_DEVICE void process(const uint4 (&chunks)[kChunks], Bits* weight, bool* mask, uint32_t kept,
                            ScoreSums& sums) const {
    float score[kWidth];
#pragma unroll
    for (int q = 0; q < kWidth / 4; ++q) {
      float four[4];
      quad_scores<kDtype>(chunks[q * 4 / kChunk], q * 4 % kChunk / 4, norms[q], four);
#pragma unroll
      for (int i = 0; i < 4; ++i) score[4 * q + i] = four[i];
    }
    uint32_t flag[kWidth];
    select_groups<kM, kKept>(score, kept, any_sign, flag);
    if constexpr (kOutput == Output::kPruneAndSum) {
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        sums.all = __fmaf_rn(score[i], score[i], sums.all);
        if (flag[i] >> 31 == 0) sums.pruned = __fmaf_rn(score[i], score[i], sums.pruned);
      }
    }
    if constexpr (kOutput == Output::kMask) {
      write_mask(flag, mask);
    } else {
#pragma unroll
      for (int c = 0; c < kChunks; ++c) write_chunk(chunks[c], flag + c * kChunk, weight + c * kChunk);
    }
  }

  WANDA_DEVICE static void write_chunk(const uint4& chunk, const uint32_t* flag, Bits* weight) {
    if constexpr (kChunk == 8) {
      store_16(weight, keep_pair(chunk.x, flag[0], flag[1]), keep_pair(chunk.y, flag[2], flag[3]),
               keep_pair(chunk.z, flag[4], flag[5]), keep_pair(chunk.w, flag[6], flag[7]));
    } else {
      store_16(weight, keep_pair(chunk.x, flag[0], flag[0]), keep_pair(chunk.y, flag[1], flag[1]),
               keep_pair(chunk.z, flag[2], flag[2]), keep_pair(chunk.w, flag[3], flag[3]));
    }
  }

  WANDA_DEVICE static void write_mask(const uint32_t (&flag)[kWidth], bool* mask) {
    uint32_t words[kWidth / 4];
#pragma unroll
    for (int q = 0; q < kWidth / 4; ++q) {
      const uint32_t low = permute_bytes(flag[4 * q], flag[4 * q + 1], 0x0073);
      const uint32_t high = permute_bytes(flag[4 * q + 2], flag[4 * q + 3], 0x7300);
      words[q] = ~permute_bytes(low, high, 0x7610) >> 7 & 0x01010101u;
    }
#pragma unroll
    for (int q = 0; q < kWidth / 4; q += 4) {
      store_16(mask + 4 * q, words[q], words[q + 1], words[q + 2], words[q + 3]);
    }
  }
};

// Rows blockIdx.x * kRows and the next ones of a matrix, all of their columns: the order of a row's sums is
// fixed.
template <Dtype kDtype, int kM, int kKept, Output kOutput>
__global__ void __launch_bounds__(kM == 32 ? 256 : 512) nm_kernel(const NmParams params) {
  using Unit = NmUnit<kDtype, kM, kKept, kOutput>;
  using Bits = typename Unit::Bits;
  constexpr int kRows = kNmRows<kM, kOutput>;
  const int64_t first_row = first_row_of(params) + static_cast<int64_t>(blockIdx.x) * kRows;
  const int64_t rest = params.norm_rows - int64_t{blockIdx.x} * kRows;
  const int rows = kRows == 1 ? 1 : static_cast<int>(min(int64_t{kRows}, rest));
  ScoreSums sums[kRows];
  for (int64_t col = static_cast<int64_t>(threadIdx.x) * Unit::kWidth; col < params.cols;
       col += static_cast<int64_t>(blockDim.x) * Unit::kWidth) {
    Bits* const weight = static_cast<Bits*>(params.weight) + first_row * params.row_stride + col;
    uint4 chunks[kRows][Unit::kChunks];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (r >= rows) break;
#pragma unroll
      for (int c = 0; c < Unit::kChunks; ++c) {
        chunks[r][c] = load_16(weight + r * params.row_stride + c * Unit::kChunk);
      }
    }
    Unit unit;
    unit.load_norms(norm_at(params, static_cast<uint32_t>(col)));
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (r >= rows) break;
      bool* const mask =
          kOutput == Output::kMask ? params.mask + (first_row + r) * params.cols + col : nullptr;
      unit.process(chunks[r], weight + r * params.row_stride, mask, static_cast<uint32_t>(params.n), sums[r]);
    }
  }
  if constexpr (kOutput == Output::kPruneAndSum) {
    WANDA_DYNAMIC_SHARED(memory);
    write_sums(sums, rows, params.score_sums + 2 * first_row, reinterpret_cast<float*>(memory));
  }
}

}  // namespace wanda::cuda
