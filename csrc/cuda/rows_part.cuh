// A thread's part of a row for rows.cuh: which columns it is, how it is loaded, how what was selected is
// written.
#pragma once

#include "bracket.cuh"
#include "rows_any.cuh"

namespace wanda::cuda {

template <Dtype kDtype, int kQuads, Output kOutput, bool kStaged>
struct RowPart {
  using Bits = typename Element<kDtype>::Bits;
  using Set = ElementSet<kQuads>;
  static constexpr int kChunk = Element<kDtype>::kChunk;
  static constexpr int kQuadsPerChunk = kChunk / 4;
  static constexpr int kChunks = kQuads / kQuadsPerChunk;

  const RowsParams& params;
  Bits* row;           // in device memory
  const Bits* staged;  // the row to read: in shared memory, or `row`
  uint32_t thread;

  // Forget the addresses of the phase before: held through a row they would spill.
  WANDA_DEVICE void start_phase() { thread = opaque(threadIdx.x); }

  WANDA_DEVICE uint32_t chunk_column(int chunk) const { return (chunk * blockDim.x + thread) * kChunk; }
  WANDA_DEVICE bool holds(uint32_t column) const { return column < static_cast<uint32_t>(params.cols); }

  // The column of bit `bit` of an ElementSet's word `i`.
  WANDA_DEVICE uint32_t column_of(int i, int bit) const {
    const int quad = i * 8 + (bit & 7) - (8 - Set::quads(i));
    return chunk_column(quad / kQuadsPerChunk) + quad % kQuadsPerChunk * 4 + bit / 8;
  }

  // Past the row's end: zeros. Shared memory holds them; the norms are then those of column 0, which are
  // finite.
  WANDA_DEVICE uint4 load_chunk(uint32_t column) const {
    if constexpr (kStaged) {
      return load_16(staged + column);
    } else {
      uint32_t words[4] = {0, 0, 0, 0};
#pragma unroll
      for (int i = 0; i < kChunk; ++i) {
        if (!holds(column + i)) break;
        words[i * sizeof(Bits) / 4] |= static_cast<uint32_t>(staged[column + i])
                                       << (i * sizeof(Bits) % 4 * 8);
      }
      return make_uint4(words[0], words[1], words[2], words[3]);
    }
  }

  WANDA_DEVICE float4 load_norms(uint32_t column, int quad) const {
    if constexpr (kStaged) {
      return __ldg(reinterpret_cast<const float4*>(params.norm + (holds(column) ? column : 0)) + quad);
    } else {
      float value[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const uint32_t at = column + 4 * quad + i;
        value[i] = holds(at) ? __ldg(params.norm + at) : 0.0f;
      }
      return make_float4(value[0], value[1], value[2], value[3]);
    }
  }

  // Once for all rows: whether no norm of this thread has its sign bit set, and column 0's, which stand in
  // for what lies past the row's end, are finite.
  WANDA_DEVICE bool has_ordinary_norms() const {
    uint32_t signs = 0;
#pragma unroll 4
    for (int c = 0; c < kChunks; ++c) {
#pragma unroll
      for (int q = 0; q < kQuadsPerChunk; ++q) {
        const float4 norms = load_norms(chunk_column(c), q);
        signs |= __float_as_uint(norms.x) | __float_as_uint(norms.y) | __float_as_uint(norms.z) |
                 __float_as_uint(norms.w);
      }
    }
    bool is_finite = true;
#pragma unroll
    for (int q = 0; q < kQuadsPerChunk; ++q) {
      const float4 norms = load_norms(0, q);
      is_finite &= fmaxf(fmaxf(norms.x, norms.y), fmaxf(norms.z, norms.w)) <= 3e38f;
      is_finite &= norms.x + norms.y + norms.z + norms.w == norms.x + norms.y + norms.z + norms.w;  // no NaN
    }
    return signs >> 31 == 0 && is_finite;
  }

  // Zeros a stage, [first_column(0), ...), past the row's end.
  WANDA_DEVICE void clear_padding(Bits* stage) const {
#pragma unroll 1
    for (int c = 0; c < kChunks; ++c) {
      const uint32_t column = chunk_column(c);
      if (!holds(column)) *reinterpret_cast<uint4*>(stage + column) = make_uint4(0, 0, 0, 0);
    }
  }

  // Chunk `c`, whose quads are those of word `i` of `pruned` from quad `first` on.
  WANDA_DEVICE void write_chunk(int64_t row_index, int c, const Set& pruned, int i, int first,
                                ScoreSums& sums) const {
    const uint32_t column = chunk_column(c);
    if (!holds(column)) return;
    if constexpr (kOutput == Output::kMask) {  // the direct kernel's
      bool* const mask = params.mask + row_index * params.cols + column;
#pragma unroll
      for (int e = 0; e < kChunk; ++e) {
        if (holds(column + e)) mask[e] = pruned.top_bits(i, first + e / 4) >> (e % 4 * 8 + 7) & 1;
      }
    } else {
      const uint4 chunk = load_chunk(column);
      uint32_t words[4] = {chunk.x, chunk.y, chunk.z, chunk.w};
#pragma unroll
      for (int q = 0; q < kQuadsPerChunk; ++q) {
        const uint32_t top = pruned.top_bits(i, first + q);
        if constexpr (kOutput == Output::kPruneAndSum) {
          float score[4];
          quad_scores<kDtype>(chunk, q, load_norms(column, q), score);
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const float square = __fmul_rn(score[i], score[i]);
            sums.all = __fadd_rn(sums.all, square);
            sums.pruned = __fadd_rn(sums.pruned, top >> (8 * i + 7) & 1 ? square : 0.0f);
          }
        }
        // The permutation spreads a byte's top bit over the bytes of its element.
        if constexpr (kQuadsPerChunk == 2) {
          words[2 * q] &= ~permute_bytes(top, 0, 0x9988);
          words[2 * q + 1] &= ~permute_bytes(top, 0, 0xbbaa);
        } else {
          words[0] &= ~permute_bytes(top, 0, 0x8888);
          words[1] &= ~permute_bytes(top, 0, 0x9999);
          words[2] &= ~permute_bytes(top, 0, 0xaaaa);
          words[3] &= ~permute_bytes(top, 0, 0xbbbb);
        }
      }
      if constexpr (kStaged) {
        store_16(row + column, words[0], words[1], words[2], words[3]);
      } else {
        for (int i = 0; i < kChunk && holds(column + i); ++i) {
          row[column + i] = static_cast<Bits>(words[i * sizeof(Bits) / 4] >> (i * sizeof(Bits) % 4 * 8));
        }
      }
    }
  }

  // 16 bytes of a mask are those of kLanes neighbours' chunks: each lane of a group of so many takes one
  // chunk of all of them, by a transposition among the lanes.
  WANDA_DEVICE void write_mask_row(int64_t row_index, const Set& pruned) {
    constexpr int kLanes = 16 / kChunk;
    start_phase();
    const uint32_t lane = thread % kLanes;
    bool* const mask = params.mask + row_index * params.cols;
#pragma unroll
    for (int i = 0; i < Set::kWords; ++i) {
#pragma unroll
      for (int c = 0; c < Set::quads(i) / kQuadsPerChunk; c += kLanes) {
        uint32_t words[kLanes][kQuadsPerChunk];
#pragma unroll
        for (int w = 0; w < 4; ++w) {
          const int quad = c * kQuadsPerChunk + w;
          words[w / kQuadsPerChunk][w % kQuadsPerChunk] =
              quad < Set::quads(i) ? pruned.top_bits(i, quad) >> 7 & 0x01010101u : 0;
        }
        transpose(words, lane);
        const uint32_t chunk = i * 8 / kQuadsPerChunk + c + lane;
        const uint32_t column = (chunk * blockDim.x + thread - lane) * kChunk;
        if (chunk < kChunks && holds(column)) {
          constexpr int kSecond = 1 / kQuadsPerChunk, kThird = 2 / kQuadsPerChunk,
                        kFourth = 3 / kQuadsPerChunk;
          store_16(mask + column, words[0][0], words[kSecond][1 % kQuadsPerChunk], words[kThird][0],
                   words[kFourth][3 % kQuadsPerChunk]);
        }
      }
    }
  }

  // words[r] of lane l becomes words[l] of lane r, within groups of kLanes lanes.
  template <int kLanes>
  WANDA_DEVICE static void transpose(uint32_t (&words)[kLanes][kQuadsPerChunk], uint32_t lane) {
#pragma unroll
    for (int step = 1; step < kLanes; step *= 2) {
#pragma unroll
      for (int low = 0; low < kLanes; ++low) {
        if ((low & step) != 0) continue;
#pragma unroll
        for (int w = 0; w < kQuadsPerChunk; ++w) {
          uint32_t& a = words[low][w];
          uint32_t& b = words[low | step][w];
          const uint32_t other = __shfl_xor_sync(kFullMask, lane & step ? a : b, step);
          (lane & step ? a : b) = other;
        }
      }
    }
  }

  WANDA_DEVICE ScoreSums write_row(int64_t row_index, const Set& pruned) {
    ScoreSums sums;
    // Unrolled with the norms of all chunks on their way, the sums would spill.
    [[maybe_unused]] constexpr int kUnroll = kOutput == Output::kPruneAndSum ? 1 : 8;
    if constexpr (kOutput == Output::kMask && kStaged) {
      write_mask_row(row_index, pruned);
      return sums;
    }
    start_phase();
#pragma unroll
    for (int i = 0; i < Set::kWords; ++i) {
#pragma unroll kUnroll
      for (int c = 0; c < Set::quads(i) / kQuadsPerChunk; ++c) {
        write_chunk(row_index, i * 8 / kQuadsPerChunk + c, pruned, i, c * kQuadsPerChunk, sums);
      }
    }
    return sums;
  }
};

}  // namespace wanda::cuda
