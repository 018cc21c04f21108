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
  static constexpr int kHalf = (kChunks + 1) / 2;  // chunks of the first half of a row

  const RowsParams& params;
  uint32_t thread;
  Bits* row = nullptr;  // in device memory
  // The staged kernel: half h of the row of step s is number 2s + h of a stream of halves. Its buffer is that
  // number modulo `halves`, and goes to the half `halves` later. For each half of the row: it lies at
  // `staged` + column of shared memory. What takes its place once it is written comes from `next` + column of
  // device memory, for columns below `limit`.
  Bits* buffers;
  int halves;
  Bits* staged[2];
  const Bits* next[2];
  uint32_t limit[2];

  // Forget the addresses of the phase before: held through a row they would spill.
  WANDA_DEVICE void start_phase() { thread = opaque(threadIdx.x); }

  WANDA_DEVICE uint32_t chunk_column(int chunk) const { return (chunk * blockDim.x + thread) * kChunk; }
  WANDA_DEVICE bool holds(uint32_t column) const { return column < static_cast<uint32_t>(params.cols); }

  // The quad, and the column, of bit `bit` of an ElementSet's word `i`.
  WANDA_DEVICE static int quad_of(int i, int bit) { return i * 8 + (bit & 7) - (8 - Set::quads(i)); }
  WANDA_DEVICE uint32_t column_of(int i, int bit) const {
    const int quad = quad_of(i, bit);
    return chunk_column(quad / kQuadsPerChunk) + quad % kQuadsPerChunk * 4 + bit / 8;
  }

  WANDA_DEVICE static constexpr int half_of(int chunk) { return chunk < kHalf ? 0 : 1; }

  // Past the row's end: zeros. Shared memory holds them; the norms are then those of column 0.
  WANDA_DEVICE uint4 load_chunk(int chunk, uint32_t column) const {
    if constexpr (kStaged) {
      return load_16(staged[half_of(chunk)] + column);
    } else {
      uint32_t words[4] = {0, 0, 0, 0};
#pragma unroll
      for (int i = 0; i < kChunk; ++i) {
        if (!holds(column + i)) break;
        words[i * sizeof(Bits) / 4] |= static_cast<uint32_t>(row[column + i]) << (i * sizeof(Bits) % 4 * 8);
      }
      return make_uint4(words[0], words[1], words[2], words[3]);
    }
  }

  WANDA_DEVICE float4 load_norms(uint32_t column, int quad) const {
    if constexpr (kStaged) {
      return __ldg(reinterpret_cast<const float4*>(norm_at(params, holds(column) ? column : 0)) + quad);
    } else {
      float value[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const uint32_t at = column + 4 * quad + i;
        value[i] = holds(at) ? __ldg(norm_at(params, at)) : 0.0f;
      }
      return make_float4(value[0], value[1], value[2], value[3]);
    }
  }

  // Once for all rows: whether no norm of this thread has its sign bit set, is infinite or NaN.
  WANDA_DEVICE bool has_ordinary_norms() const {
    uint32_t largest = 0;
#pragma unroll 4
    for (int c = 0; c < kChunks; ++c) {
#pragma unroll
      for (int q = 0; q < kQuadsPerChunk; ++q) {
        const float4 norms = load_norms(chunk_column(c), q);
#pragma unroll
        for (int i = 0; i < 4; ++i) largest = max(largest, __float_as_uint(component(norms, i)));
      }
    }
    return largest < 0x7f800000u;
  }

  WANDA_DEVICE uint32_t capacity() const { return blockDim.x * kChunk * kHalf; }  // columns of a half
  WANDA_DEVICE void read_from(int half, int buffer) {
    staged[half] = buffers + (buffer - half) * static_cast<int>(capacity());
  }
  WANDA_DEVICE void refill_from(int half, int number) {
    const int64_t row_index = blockIdx.x + int64_t{gridDim.x} * (number >> 1);
    const int shift = ((number & 1) - half) * static_cast<int>(capacity());
    next[half] = static_cast<const Bits*>(params.weight) +
                 (first_row_of(params) + row_index) * params.row_stride + shift;
    limit[half] = row_index < params.norm_rows ? max(static_cast<int>(params.cols) - shift, 0) : 0;
  }

  // The next chunk on its way into the place of chunk `c`, which nobody reads any more. Past a row's end:
  // zeros.
  WANDA_DEVICE void refill(int c) {
    if constexpr (kStaged) {
      const int half = half_of(c);
      const uint32_t column = chunk_column(c);
      copy_async_16(staged[half] + column, next[half] + column, column < limit[half]);
      if (c == kHalf - 1 || c == kChunks - 1) copy_async_commit();
    }
  }
  WANDA_DEVICE void refill_all() {
    start_phase();
#pragma unroll
    for (int c = 0; c < kChunks; ++c) refill(c);
  }
  // Before the first row: as many halves as there are buffers, each as a first half's successor.
  WANDA_DEVICE void fill() {
#pragma unroll 1
    for (int number = 0; number < halves; ++number) {
      read_from(0, number);
      refill_from(0, number);
#pragma unroll
      for (int c = 0; c < kHalf; ++c) refill(c);
    }
  }

  // Chunk `c`, whose quads are those of word `i` of `pruned` from quad `first` on; adds to `sum` the squared
  // scores that go.
  WANDA_DEVICE void write_chunk(int64_t row_index, int c, const Set& pruned, int i, int first, float& sum) {
    const uint32_t column = chunk_column(c);
    if (!holds(column)) return;
    if constexpr (kOutput == Output::kMask) {  // the direct kernel's
      bool* const mask = params.mask + row_index * params.cols + column;
#pragma unroll
      for (int e = 0; e < kChunk; ++e) {
        if (holds(column + e)) mask[e] = pruned.top_bits(i, first + e / 4) >> (e % 4 * 8 + 7) & 1;
      }
    } else {
      const uint4 chunk = load_chunk(c, column);
      const uint32_t words[4] = {chunk.x, chunk.y, chunk.z, chunk.w};
      uint32_t gone[4];  // what is pruned, and zeros
#pragma unroll
      for (int q = 0; q < kQuadsPerChunk; ++q) {
        // The permutation spreads a byte's top bit over the bytes of its element.
        const uint32_t top = pruned.top_bits(i, first + q);
        if constexpr (kQuadsPerChunk == 2) {
          gone[2 * q] = words[2 * q] & permute_bytes<0x9988>(top, 0);
          gone[2 * q + 1] = words[2 * q + 1] & permute_bytes<0xbbaa>(top, 0);
        } else {
          gone[0] = words[0] & permute_bytes<0x8888>(top, 0);
          gone[1] = words[1] & permute_bytes<0x9999>(top, 0);
          gone[2] = words[2] & permute_bytes<0xaaaa>(top, 0);
          gone[3] = words[3] & permute_bytes<0xbbbb>(top, 0);
        }
        if constexpr (kOutput == Output::kPruneAndSum) {
          float value[4];
          quad_values<kDtype>(make_uint4(gone[0], gone[1], gone[2], gone[3]), q, value);
          const float4 norms = load_norms(column, q);
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            const float score = __fmul_rn(value[e], component(norms, e));  // but for its sign
            sum = __fmaf_rn(score, score, sum);
          }
        }
      }
      if constexpr (kStaged) {
        store_16(row + column, words[0] ^ gone[0], words[1] ^ gone[1], words[2] ^ gone[2],
                 words[3] ^ gone[3]);
      } else {
        for (int e = 0; e < kChunk && holds(column + e); ++e) {
          const int word = e * sizeof(Bits) / 4;
          row[column + e] = static_cast<Bits>((words[word] ^ gone[word]) >> (e * sizeof(Bits) % 4 * 8));
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

  // Returns the sum of this thread's squared scores that go; what was in shared memory makes way.
  WANDA_DEVICE float write_row(int64_t row_index, const Set& pruned) {
    float sum = 0;
    if constexpr (kOutput == Output::kMask && kStaged) {
      refill_all();
      write_mask_row(row_index, pruned);
      return sum;
    }
    start_phase();
#pragma unroll
    for (int i = 0; i < Set::kWords; ++i) {
#pragma unroll
      for (int c = 0; c < Set::quads(i) / kQuadsPerChunk; ++c) {
        const int chunk = i * 8 / kQuadsPerChunk + c;
        write_chunk(row_index, chunk, pruned, i, c * kQuadsPerChunk, sum);
        refill(chunk);
      }
    }
    return sum;
  }
};

}  // namespace wanda::cuda
