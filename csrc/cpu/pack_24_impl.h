// 2:4 packing. Included by pack_24_<isa>.cpp after the target pragma; one thread.
//
// Blocks of 1024 columns: nm_impl.h decides which two of four are pruned (where norm is given), the rest is
// masked and tested for zero, and the four non-zero bits of a group choose its two indices as torch does
// (sparse. _semi_structured_conversions). -0 counts as zero, NaN does not; a group with fewer than two
// non-zeros gets zeros, kept or pruned, to fill up:
//   idx0 = first of {0, 1, 2} that is non-zero, else 2; idx1 by the two upper bits below.
// Metadata is 4 bits a group, computed on 16 groups per word. torch's reordering is a transposition of 32
// rows x 2 metadata columns into 128 contiguous bytes, so metadata is kept for 32 rows in L1/L2 and written
// one block at a time: stores row by row would hit one L1 set with their stride of 4 * rows bytes. Bytes
// moved: the weight is read once, 9/16 of it written.
#pragma once

#include "convert.h"
#include "nm_impl.h"
#include "pack_24.h"

namespace wanda::cpu {
namespace {

constexpr int64_t kPackRows = 32;    // torch's reordering moves metadata inside blocks of 32 rows
constexpr int64_t kPackCols = 4096;  // columns whose metadata is kept: 16 KiB

// Metadata of the 16 groups whose non-zero bits are `nonzero`, with torch's Boolean functions.
inline uint64_t pack_24_metadata(uint64_t nonzero) {
  const uint64_t m0 = nonzero & kLane0;
  const uint64_t m1 = nonzero >> 1 & kLane0;
  const uint64_t m3 = nonzero >> 3 & kLane0;
  const uint64_t only1 = ~m0 & m1;
  const uint64_t neither = (m0 | m1) ^ kLane0;
  return only1 | neither << 1 | ((m0 & m1) | neither | m3) << 2 | (only1 | (m1 ^ kLane0)) << 3;
}

// Bit 4 g: group g has more than two non-zeros.
inline uint64_t pack_24_overfull(uint64_t nonzero) {
  const uint64_t both = nonzero & nonzero >> 1;
  const uint64_t either = nonzero | nonzero >> 1;
  return ((both & either >> 2) | (either & both >> 2)) & kLane0;
}

// Where torch's reordering puts metadata column `column` (16 dense columns each) of `row`.
inline int64_t pack_24_position(int64_t row, int64_t column, int64_t rows) {
  const int64_t to = row / 32 * 32 + row % 8 * 4 + row % 32 / 8;
  return (column / 2 * rows + to / 2 * 2 + column % 2) * 2 + to % 2;
}

// Selections write bits.word[i]: which of the columns 64 i .. 64 i + 63 are pruned. NmSelect is the third
// one.
struct PackSelectNothing {
  void operator()(const uint16_t*, int64_t, int64_t, NmBits&) {}  // the bits stay 0
};

template <class Lanes, Dtype dtype>
struct PackSelectGeneral {
  const float* norm;

  void operator()(const uint16_t* w, int64_t column, int64_t count, NmBits& bits) {
    for (int64_t j = 0; j < count; j += 64) {
      NmBits one;
      nm_rank<typename Lanes::Nm, dtype>(w + j, norm + column + j, 16, 4, 2, one);
      bits.word[j / 64] = one.word[0];
    }
  }
};

// Rows [begin, end) of one block of 32 rows that starts at `block`, columns `column` .. + cols.
inline void pack_24_store_metadata(const uint16_t* kept, const Pack24Params& p, int64_t block, int64_t begin,
                                   int64_t end, int64_t column, int64_t cols) {
  constexpr int64_t kStride = kPackCols / 16;
  for (int64_t c = 0; c < cols / 16; c += 2) {
    if (end - begin == kPackRows) {
      uint16_t* out = p.metadata + (column / 32 + c / 2) * 2 * p.rows + 2 * block;
      for (int64_t q = 0; q < 8; ++q) {
        for (int64_t r = q; r < 32; r += 16) {
          const uint16_t* even = kept + r * kStride + c;
          const uint16_t* odd = even + 8 * kStride;
          const uint64_t four =
              uint64_t{even[0]} | uint64_t{odd[0]} << 16 | uint64_t{even[1]} << 32 | uint64_t{odd[1]} << 48;
          std::memcpy(out, &four, sizeof(four));
          out += 4;
        }
      }
    } else {
      for (int64_t row = begin; row < end; ++row) {
        for (int64_t i = c; i < c + 2; ++i) {
          p.metadata[pack_24_position(row, column / 16 + i, p.rows)] = kept[(row - block) * kStride + i];
        }
      }
    }
  }
}

// Packs `count` columns, a multiple of 64 and at most kNmBlock. Returns the number of overfull groups.
template <class Lanes>
int64_t pack_24_block(const uint16_t* w, int64_t count, const NmBits& pruned, uint16_t* values,
                      uint16_t* metadata) {
  NmBits nonzero;
  Lanes::nonzero(w, count, pruned, nonzero);
  Lanes::values(w, count, pruned, nonzero, values);
  uint64_t groups[kNmBlock / 64];
  uint64_t overfull[kNmBlock / 64];
  uint64_t any = 0;
  for (int64_t i = 0; i < count / 64; ++i) {
    groups[i] = pack_24_metadata(nonzero.word[i]);
    overfull[i] = pack_24_overfull(nonzero.word[i]);
    any |= overfull[i];
  }
  std::memcpy(metadata, groups, static_cast<size_t>(count / 8));
  if (any == 0) return 0;
  int64_t total = 0;
  for (int64_t i = 0; i < count / 64; ++i) total += __builtin_popcountll(overfull[i]);
  return total;
}

template <class Lanes, class Select>
int64_t pack_24_rows(const Pack24Params& p, int64_t begin, int64_t end, Select&& select) {
  uint16_t kept[kPackRows * kPackCols / 16];
  NmBits pruned = {};
  int64_t overfull = 0;
  for (int64_t first = begin; first < end;) {
    const int64_t block = first / kPackRows * kPackRows;
    const int64_t last = end < block + kPackRows ? end : block + kPackRows;
    for (int64_t tile = 0; tile < p.cols; tile += kPackCols) {
      const int64_t tile_cols = p.cols - tile < kPackCols ? p.cols - tile : kPackCols;
      for (int64_t row = first; row < last; ++row) {
        for (int64_t from = 0; from < tile_cols; from += kNmBlock) {
          const int64_t column = tile + from;
          const int64_t count = tile_cols - from < kNmBlock ? tile_cols - from : kNmBlock;
          const uint16_t* w = p.weight + row * p.row_stride + column;
          select(w, column, count, pruned);
          overfull += pack_24_block<Lanes>(w, count, pruned, p.values + row * (p.cols / 2) + column / 2,
                                           kept + (row - block) * (kPackCols / 16) + from / 16);
        }
      }
      pack_24_store_metadata(kept, p, block, first, last, tile, tile_cols);
    }
    first = last;
  }
  return overfull;
}

struct PackLanesScalar {
  using Nm = NmLanesScalar;

  // Which of the columns that are not pruned hold neither +0 nor -0.
  static void nonzero(const uint16_t* w, int64_t count, const NmBits& pruned, NmBits& out) {
    for (int64_t j = 0; j < count; j += 64) {
      uint64_t word = 0;
      for (int64_t i = 0; i < 64; ++i) word |= static_cast<uint64_t>((w[j + i] & 0x7fff) != 0) << i;
      out.word[j / 64] = word & ~pruned.word[j / 64];
    }
  }

  static void values(const uint16_t* w, int64_t count, const NmBits& pruned, const NmBits& nonzero,
                     uint16_t* out) {
    for (int64_t j = 0; j < count; j += 64) {
      const uint64_t keep = ~pruned.word[j / 64];
      const uint64_t groups = pack_24_metadata(nonzero.word[j / 64]);
      for (int64_t i = 0; i < 32; ++i) {
        const int64_t at = i / 2 * 4 + static_cast<int64_t>(groups >> (2 * i) & 3);
        out[j / 2 + i] = (keep >> at & 1) != 0 ? w[j + at] : uint16_t{0};
      }
    }
  }
};

template <class Lanes, Dtype dtype>
int64_t pack_24_typed(const Pack24Params& p, int64_t begin, int64_t end) {
  if (p.norm == nullptr) return pack_24_rows<Lanes>(p, begin, end, PackSelectNothing{});
  if constexpr (Lanes::Nm::kFast) {
    if (!nm_any_negative(p.norm, p.cols)) {
      return pack_24_rows<Lanes>(p, begin, end,
                                 typename Lanes::Nm::template Select<dtype, 4>(p.norm, p.cols, 2));
    }
  }
  return pack_24_rows<Lanes>(p, begin, end, PackSelectGeneral<Lanes, dtype>{p.norm});
}

template <class Lanes>
int64_t pack_24_run(const Pack24Params& p, int64_t begin, int64_t end) {
  const HonourDenormals honour_denormals;
  return p.dtype == Dtype::kFloat16 ? pack_24_typed<Lanes, Dtype::kFloat16>(p, begin, end)
                                    : pack_24_typed<Lanes, Dtype::kBFloat16>(p, begin, end);
}

}  // namespace
}  // namespace wanda::cpu
