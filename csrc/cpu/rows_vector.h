// Row selection's steps for sets with registers, in terms of what Avx2 and Avx512 have in common. Their own
// are the keys, the counting (16 table entries of a byte, or 32 of 16 bits) and the pruning (vectors of
// flags, or masks): two algorithms each, not one with two spellings.
#pragma once

#include "rows_impl.h"

namespace wanda::cpu {
namespace {

template <class Vector>
struct RowsVectorSteps {
  using Own = RowsSteps<Vector>;

  struct Range {  // keys in (below, last]
    typename Vector::Ints below16, last16, below32;
  };
  struct VectorSums {
    typename Vector::Floats all, pruned;
  };

  template <Dtype D>
  WANDA_STEP static typename Vector::Pair scores(const typename Element<D>::Bits* w, const float* norm) {
    const typename Vector::Pair x = Vector::template load_pair<D>(w);
    return {Vector::multiply(x.a, Vector::load(norm)),
            Vector::multiply(x.b, Vector::load(norm + Vector::kLanes))};
  }

  // The block's share, a half, of the next row.
  template <Dtype D>
  WANDA_STEP static void prefetch(const char* half_row, int64_t block) {
    constexpr int64_t kBytes = kBlock / 2 * static_cast<int64_t>(sizeof(typename Element<D>::Bits));
    for (int64_t i = 0; i < kBytes; i += 64) prefetch_l2(half_row + block * kBytes + i);
  }

  template <Dtype D>
  WANDA_PASS static int64_t make_keys(const typename Element<D>::Bits* w, const float* norm, uint16_t* keys,
                                      int64_t blocks, int base, int span) {
    constexpr int64_t kKeys = 2 * Vector::kLanes;
    const auto low = Own::all_of_16(base), most = Own::all_of_16(span);
    typename Vector::Ints total{};
    for (int64_t first = 0; first < blocks; first += kKeys) {  // no 16-bit lane overflows
      const int64_t stop = min_of(blocks, first + kKeys);
      typename Vector::Ints part{};
      for (int64_t block = first; block < stop; ++block) {
        for (int64_t j = 0; j < kBlock; j += kKeys) {
          const int64_t i = block * kBlock + j;
          const auto x = Own::keys_of(scores<D>(w + i, norm + i));
          Own::store_keys(keys + i, x);
          part = Own::add_clamped(part, x, low, most);
        }
      }
      total = Own::add_halves(total, part);
    }
    return Own::sum_of(total);
  }

  template <Dtype D, bool kMask, bool kSums>
  WANDA_PASS static int64_t write(typename Element<D>::Bits* w, bool* mask, const uint16_t* keys,
                                  const float* norm, int64_t blocks, int below, int last, int32_t* places,
                                  int32_t first_place, Sums& sums, const char* next) {
    const Range range{Own::all_of_16(below), Own::all_of_16(last), Vector::all_of(below * 65536 + 65535)};
    VectorSums part{Vector::zero(), Vector::zero()};
    int64_t listed = 0;
    for (int64_t block = 0; block < blocks; ++block) {
      prefetch<D>(next, block);
      uint64_t inside = 0;
      for (int64_t half = 0; half < 2; ++half) {
        const int64_t i = block * kBlock + half * 32;
        const uint32_t bits =
            Own::template write_32<D, kMask, kSums>(w + i, mask + i, keys + i, norm + i, range, part);
        inside |= uint64_t{bits} << (32 * half);
      }
      listed = append_places<kKeyLanes<Vector, D>>(inside, first_place + static_cast<int32_t>(block * kBlock),
                                                   places, listed);
      if constexpr (kSums) {
        if (block % 64 == 63 || block + 1 == blocks) {
          sums.all += Vector::sum(part.all);
          sums.pruned += Vector::sum(part.pruned);
          part = {Vector::zero(), Vector::zero()};
        }
      }
    }
    return listed;
  }
};

}  // namespace
}  // namespace wanda::cpu
