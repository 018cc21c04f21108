// 2:4 packing, one thread.
//
// Blocks of 1024 columns: nm_impl.h decides which two of four are pruned (where norm is given), the rest is
// masked and tested for zero, and the four non-zero bits of a group choose its two indices as torch does
// (sparse. _semi_structured_conversions). -0 counts as zero, NaN does not; a group with fewer than two
// non-zeros gets zeros, kept or pruned, to fill up:
//   idx0 = first of {0, 1, 2} that is non-zero, else 2; idx1 by the two upper bits below.
// Metadata is 4 bits a group, computed on 16 groups per word. torch's reordering is a transposition of 32
// rows x 2 metadata columns into 128 contiguous bytes, so metadata is kept for 32 whole rows (64 bytes per 16
// columns, in L2) and written as such blocks. Rows are walked from end to end: tiles of 4096 columns would
// keep the metadata in L1, and took 1.9 x memcpy where whole rows take 0.75 (28672 x 8192, nothing to
// select), for the prefetchers start again at each piece. Bytes moved: the weight is read once, 9/16 of it
// written.
#pragma once

#if defined(__x86_64__)
#include <emmintrin.h>
#endif

#include "nm_impl.h"

namespace wanda::cpu {
namespace {

constexpr int64_t kPackRows = 32;  // torch's reordering moves metadata inside blocks of 32 rows

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

// Selections as NmSelect.
struct PackSelectNothing {
  static constexpr int kRows = 1;

  template <int rows>
  void run(const uint16_t* const*, int64_t, int64_t, NmBits*) {}  // the bits stay 0
};

template <class Vector, Dtype dtype>
struct PackSelectGeneral {
  static constexpr int kRows = 1;
  const float* norm;

  template <int rows>
  void run(const uint16_t* const* w, int64_t column, int64_t count, NmBits* bits) {
    for (int r = 0; r < rows; ++r) {
      for (int64_t j = 0; j < count; j += 64) {
        NmBits one;
        nm_rank<Vector, dtype>(w[r] + j, norm + column + j, 16, 4, 2, one);
        bits[r].word[j / 64] = one.word[0];
      }
    }
  }
};

#if defined(__x86_64__)
// Past the caches: the 128 bytes per 32 columns lie 4 * rows bytes apart, so ordinary stores would wait for a
// cache line and a page each (28672 x 8192 took 2.7 x memcpy, 1.9 with these).
inline void pack_24_stream(void* out, uint64_t low, uint64_t high) {
  _mm_stream_si128(static_cast<__m128i*>(out),
                   _mm_set_epi64x(static_cast<long long>(high), static_cast<long long>(low)));
}
inline void pack_24_fence() { _mm_sfence(); }
#else
inline void pack_24_stream(void* out, uint64_t low, uint64_t high) {
  const uint64_t both[2] = {low, high};
  std::memcpy(out, both, sizeof(both));
}
inline void pack_24_fence() {}
#endif

// The reordered metadata of two rows, `kept` of the first and of the one eight rows below, columns 0 and 1.
inline uint64_t pack_24_two_rows(const uint16_t* kept, int64_t stride) {
  const uint16_t* below = kept + 8 * stride;
  return uint64_t{kept[0]} | uint64_t{below[0]} << 16 | uint64_t{kept[1]} << 32 | uint64_t{below[1]} << 48;
}

// Rows [begin, end) of one block of 32 rows that starts at `block`; `kept` holds the metadata of its rows,
// `stride` apart.
inline void pack_24_store_metadata(const uint16_t* kept, int64_t stride, const Pack24Params& p, int64_t block,
                                   int64_t begin, int64_t end) {
  const bool whole = end - begin == kPackRows && reinterpret_cast<uintptr_t>(p.metadata) % 16 == 0;
  for (int64_t c = 0; c < p.cols / 16; c += 2) {
    if (whole) {
      uint16_t* out = p.metadata + c * p.rows + 2 * block;
      for (int64_t q = 0; q < 8; ++q) {
        const uint16_t* rows = kept + q * stride + c;
        pack_24_stream(out + 8 * q, pack_24_two_rows(rows, stride),
                       pack_24_two_rows(rows + 16 * stride, stride));
      }
    } else {
      for (int64_t row = begin; row < end; ++row) {
        for (int64_t i = c; i < c + 2; ++i) {
          p.metadata[pack_24_position(row, i, p.rows)] = kept[(row - block) * stride + i];
        }
      }
    }
  }
}

// nonzero(..) and values(..): see PackSteps<Scalar>.
template <class Vector>
struct PackSteps;

// Packs `count` columns, a multiple of 64 and at most kNmBlock. Returns the number of overfull groups.
template <class Vector>
int64_t pack_24_block(const uint16_t* w, int64_t count, const NmBits& pruned, uint16_t* values,
                      uint16_t* metadata) {
  NmBits nonzero;
  PackSteps<Vector>::nonzero(w, count, pruned, nonzero);
  PackSteps<Vector>::values(w, count, pruned, nonzero, values);
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

// Rows row .. row + rows - 1; the metadata goes to `kept`, rows `stride` apart.
template <class Vector, int rows, class Select>
int64_t pack_24_rows(const Pack24Params& p, int64_t row, Select& select, NmBits* pruned, uint16_t* kept,
                     int64_t stride) {
  int64_t overfull = 0;
  for (int64_t column = 0; column < p.cols; column += kNmBlock) {
    const int64_t count = p.cols - column < kNmBlock ? p.cols - column : kNmBlock;
    const uint16_t* w[rows];
    for (int r = 0; r < rows; ++r) w[r] = p.weight + (row + r) * p.row_stride + column;
    select.template run<rows>(w, column, count, pruned);
    for (int r = 0; r < rows; ++r) {
      uint16_t* values = p.values + (row + r) * (p.cols / 2) + column / 2;
      overfull += pack_24_block<Vector>(w[r], count, pruned[r], values, kept + r * stride + column / 16);
    }
  }
  return overfull;
}

template <class Vector, class Select>
int64_t pack_24_all(const Pack24Params& p, int64_t begin, int64_t end, Select select) {
  // 32 more than needed, so that rows do not fall into the same cache sets.
  const int64_t stride = p.cols / 16 + 32;
  NmBuffer<uint16_t> kept(kPackRows * stride);
  constexpr int kRows = Select::kRows;
  NmBits pruned[kRows] = {};
  int64_t overfull = 0;
  for (int64_t first = begin; first < end;) {
    const int64_t block = first / kPackRows * kPackRows;
    const int64_t last = end < block + kPackRows ? end : block + kPackRows;
    int64_t row = first;
    for (; row + kRows <= last; row += kRows) {
      overfull +=
          pack_24_rows<Vector, kRows>(p, row, select, pruned, kept.data() + (row - block) * stride, stride);
    }
    for (; row < last; ++row) {
      overfull +=
          pack_24_rows<Vector, 1>(p, row, select, pruned, kept.data() + (row - block) * stride, stride);
    }
    pack_24_store_metadata(kept.data(), stride, p, block, first, last);
    first = last;
  }
  pack_24_fence();
  return overfull;
}

template <>
struct PackSteps<Scalar> {
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

template <class Vector, Dtype dtype>
int64_t pack_24_typed(const Pack24Params& p, int64_t begin, int64_t end) {
  if (p.norm == nullptr) return pack_24_all<Vector>(p, begin, end, PackSelectNothing{});
  if constexpr (Vector::kLanes > 1) {
    if (!nm_any_negative(p.norm, p.cols)) {
      return pack_24_all<Vector>(p, begin, end,
                                 typename NmSelectFor<Vector, dtype, 4>::Type(p.norm, p.cols, 2));
    }
  }
  return pack_24_all<Vector>(p, begin, end, PackSelectGeneral<Vector, dtype>{p.norm});
}

template <class Vector>
int64_t pack_24_run(const Pack24Params& p, int64_t begin, int64_t end) {
  const HonourDenormals honour_denormals;
  return p.dtype == Dtype::kFloat16 ? pack_24_typed<Vector, Dtype::kFloat16>(p, begin, end)
                                    : pack_24_typed<Vector, Dtype::kBFloat16>(p, begin, end);
}

}  // namespace
}  // namespace wanda::cpu
