// 2:4 packing: select (where norms are given) and pack in one pass, and back.
//
// Algorithm: selection as nm.cuh. Of the four masked elements, non-zero flags 0, 1 and 3 make a code of three
// bits, which decides both indices by torch's rule, groups with fewer than two non-zeros included. The codes
// of four groups are the selector of byte permutations that serve as tables: of the metadata, and of the
// selectors that pick the two values. 12 SASS instructions an element, 7 without the selection.
//
// torch's layout of the metadata: with one 16-bit word for 16 columns, word (r, c) goes to
//
//   c / 2 * 2 * rows + (r / 32 * 32 + r % 8 * 4 + r % 32 / 8) * 2 + c % 2,
//
// then each 2 x 2 block of words swaps its off-diagonal. Rows r, r + 8, r + 16, r + 24 and columns c, c + 1
// (c even) are therefore 16 bytes in a row.
//
// Assumes: rows a multiple of 32, cols of 64, all pointers and rows 16-byte aligned.
//
// One thread: those four rows, 32 columns, 16 at a time: eight loads on their way. A warp: 32 rows, 128
// columns; its metadata is four lines of 128 bytes.
//
// Bytes an element: 2 in, 1.125 out; norms are loaded once for four rows.
#pragma once

#include "group.cuh"

namespace wanda::cuda {

// This thread's place in the matrix.
struct PackTile {
  int64_t row;       // the first of four, 8 apart
  int64_t col;       // the first of 32
  int64_t metadata;  // of its eight words
  bool is_inside;

  WANDA_DEVICE PackTile(int64_t rows, int64_t cols) {
    const int64_t warp = (static_cast<int64_t>(blockIdx.x) * kPackThreads + threadIdx.x) / kWarp;
    const int lane = threadIdx.x % kWarp;
    const int64_t tiles = (cols + 127) / 128;
    const int64_t group = warp / tiles;
    row = group * 32 + lane / 4;
    col = warp % tiles * 128 + lane % 4 * 32;
    metadata = col / 32 * 2 * rows + (group * 32 + lane / 4 * 4) * 2;
    is_inside = row < rows && col < cols;
  }
};

// Bits 15 and 31: is the half of the word not zero?
WANDA_DEVICE uint32_t nonzero(uint32_t word) { return (word & 0x7fff7fffu) + 0x7fff7fffu; }

// Sixteen columns of a row: eight values, and the word of metadata (in the low half).
struct Packed16 {
  uint32_t values[4];
  uint32_t metadata;
};

// `word`: the eight words of sixteen masked elements.
WANDA_DEVICE Packed16 pack_16(const uint32_t (&word)[8]) {
  uint32_t codes = 0;
#pragma unroll
  for (int g = 3; g >= 0; --g) {
    // Flags 0, 1 and 3 at bits 7, 15 and 23; the product has them at bits 28, 29 and 30, below a zero.
    const uint32_t flags =
        permute_bytes(nonzero(word[2 * g]), nonzero(word[2 * g + 1]), 0x0731) & 0x00808080u;
    codes = __funnelshift_l(flags * 0x00204080u, codes, 4);
  }
  // By code: index0 | index1 << 2, and the selectors of element index0 and of element index1.
  const uint32_t nibbles = permute_bytes(0x0409080eu, 0x040d0c0eu, codes);
  const uint32_t select0 = permute_bytes(0x10321054u, 0x10321054u, codes);
  const uint32_t select1 = permute_bytes(0x32545476u, 0x32767676u, codes);
  Packed16 packed;
  packed.metadata = permute_bytes(nibbles | nibbles >> 4, 0, 0x4420);
#pragma unroll
  for (int g = 0; g < 4; ++g) {
    const uint32_t selector = permute_bytes(select0, select1, (4 + g) << 4 | g);
    packed.values[g] = permute_bytes(word[2 * g], word[2 * g + 1], selector);
  }
  return packed;
}

// Zeroes two elements of each group of four in `word`, the eight words of `chunks`.
template <Dtype kDtype>
WANDA_DEVICE void keep_two_of_four(const uint4 (&chunks)[2], const float4 (&norms)[4], bool any_sign,
                                   uint32_t (&word)[8]) {
  float score[16];
  uint32_t flag[16];
#pragma unroll
  for (int g = 0; g < 4; ++g) {
    float four[4];
    quad_scores<kDtype>(chunks[g / 2], g % 2, norms[g], four);
#pragma unroll
    for (int i = 0; i < 4; ++i) score[4 * g + i] = four[i];
  }
  select_groups<4, 2>(score, 2, any_sign, flag);
#pragma unroll
  for (int i = 0; i < 8; ++i) word[i] = keep_pair(word[i], flag[2 * i], flag[2 * i + 1]);
}

WANDA_DEVICE uint32_t count_overfull(const uint32_t (&word)[8]) {
  uint32_t count = 0;
#pragma unroll
  for (int g = 0; g < 4; ++g) {
    const uint32_t first = nonzero(word[2 * g]) & 0x80008000u,
                   second = nonzero(word[2 * g + 1]) & 0x80008000u;
    count += __popc(first | second >> 1) > 2;
  }
  return count;
}

template <Dtype kDtype, bool kSelect>
__global__ void __launch_bounds__(kPackThreads) pack_24_kernel(const Pack24Params params) {
  const PackTile tile(params.rows, params.cols);
  uint32_t overfull = 0;
  if (tile.is_inside) {
    uint32_t metadata[4];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t col = tile.col + 16 * half;
      float4 norms[4];
      uint32_t signs = 0;
      if constexpr (kSelect) {
#pragma unroll
        for (int g = 0; g < 4; ++g) {
          norms[g] = __ldg(reinterpret_cast<const float4*>(params.norm + col) + g);
          signs |= sign_bits(norms[g]);
        }
      }
      // All rows' loads before the first store, which no load may pass.
      uint4 chunks[4][2];
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        const uint16_t* const weight = params.weight + (tile.row + 8 * r) * params.row_stride + col;
        chunks[r][0] = load_16(weight);
        chunks[r][1] = load_16(weight + 8);
      }
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        const int64_t row = tile.row + 8 * r;
        uint32_t word[8];
#pragma unroll
        for (int i = 0; i < 8; ++i) word[i] = component(chunks[r][i / 4], i % 4);
        if constexpr (kSelect) keep_two_of_four<kDtype>(chunks[r], norms, signs >> 31 != 0, word);
        const Packed16 packed = pack_16(word);
        if constexpr (!kSelect) overfull += count_overfull(word);
        store_16(params.values + row * (params.cols / 2) + col / 2, packed.values[0], packed.values[1],
                 packed.values[2], packed.values[3]);
        metadata[r] = half == 0 ? packed.metadata : metadata[r] | packed.metadata << 16;
      }
    }
    store_16(params.metadata + tile.metadata, permute_bytes(metadata[0], metadata[1], 0x5410),
             permute_bytes(metadata[0], metadata[1], 0x7632), permute_bytes(metadata[2], metadata[3], 0x5410),
             permute_bytes(metadata[2], metadata[3], 0x7632));
  }
  if constexpr (!kSelect) {
    if (params.overfull != nullptr && overfull != 0) atomicAdd(params.overfull, overfull);
  }
}

// The elements at the two indices of a nibble, zeros elsewhere.
WANDA_DEVICE uint64_t spread_pair(uint32_t values, uint32_t nibble) {
  return static_cast<uint64_t>(values & 0xffffu) << (nibble & 3) * 16 | static_cast<uint64_t>(values >> 16)
                                                                            << (nibble >> 2 & 3) * 16;
}

__global__ void __launch_bounds__(kPackThreads) unpack_24_kernel(const Unpack24Params params) {
  const PackTile tile(params.rows, params.cols);
  if (!tile.is_inside) return;
  const uint4 words = load_16(params.metadata + tile.metadata);
  const uint32_t metadata[4] = {
      permute_bytes(words.x, words.y, 0x5410), permute_bytes(words.x, words.y, 0x7632),
      permute_bytes(words.z, words.w, 0x5410), permute_bytes(words.z, words.w, 0x7632)};
#pragma unroll
  for (int r = 0; r < 4; ++r) {
    const int64_t row = tile.row + 8 * r;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t col = tile.col + 16 * half;
      const uint4 values = load_16(params.values + row * (params.cols / 2) + col / 2);
      uint64_t group[4];
#pragma unroll
      for (int g = 0; g < 4; ++g) {
        group[g] = spread_pair(component(values, g), metadata[r] >> (16 * half + 4 * g) & 15);
      }
      uint16_t* const weight = params.weight + row * params.cols + col;
      store_16(weight, static_cast<uint32_t>(group[0]), static_cast<uint32_t>(group[0] >> 32),
               static_cast<uint32_t>(group[1]), static_cast<uint32_t>(group[1] >> 32));
      store_16(weight + 8, static_cast<uint32_t>(group[2]), static_cast<uint32_t>(group[2] >> 32),
               static_cast<uint32_t>(group[3]), static_cast<uint32_t>(group[3] >> 32));
    }
  }
}

}  // namespace wanda::cuda
