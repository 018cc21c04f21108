// N:M selection: which M - N of every M consecutive columns have the smallest scores |w| * norm, lowest
// column first among equals. One thread, up to four rows side by
// side.
//
// Fast path (M = 4 or 8, no negative norm), on blocks of 1024 columns that stay in L1:
//   1. compare: the score's bits, sign cleared and NaN clamped to one value, are an int32 key that orders as
//      torch.sort does. In-register rotations compare every key with the others of its group; a tie goes to
//      the lower column by a bias of 1 on the lanes that wrap around. Only the bits of the comparisons are
//      stored, 16 (or 8) lanes at a time.
//   2. decide: 64 columns per word, bitwise adders count how many of its group come after each element;
//      it is pruned if there are at least N. Plain C that compilers vectorise: about 0.1 operations a column.
//   3. apply: zero the pruned elements, or write the mask.
// bf16 with AVX-512 has other steps 1 and 2: nm_avx512.h.
// Bytes moved: the row is read and written once (in place), or read once and a byte a column written (mask).
//
// General path (any M, any norm, and everything in the scalar build): nm_general.h.
#pragma once

#include "nm_block.h"
#include "nm_general.h"

namespace wanda::cpu {
namespace {

// ---- Step 1: comparisons.

// M = 4: next[i]: i comes before i + 1 mod 4. across[i]: i comes before i + 2, valid for i = 0, 1.
// M = 8, x = elements 0..3 and y = elements 4..7 of each group: the same inside x and inside y, and
// against[r][i]: x_i comes before y_(i + r mod 4).
struct alignas(64) NmComparisons4 {
  uint64_t next[kNmBlock / 64];
  uint64_t across[kNmBlock / 64];
};

struct alignas(64) NmComparisons8 {
  uint64_t next_x[kNmBlock / 128];
  uint64_t next_y[kNmBlock / 128];
  uint64_t across_x[kNmBlock / 128];
  uint64_t across_y[kNmBlock / 128];
  uint64_t against[4][kNmBlock / 128];
};

template <int m>
struct NmComparisonsOf;
template <>
struct NmComparisonsOf<4> {
  using Type = NmComparisons4;
};
template <>
struct NmComparisonsOf<8> {
  using Type = NmComparisons8;
};

// The score's bits, sign cleared, NaN clamped.
template <class Vector, Dtype dtype>
WANDA_STEP inline typename Vector::Ints nm_score_keys(const typename Element<dtype>::Bits* w,
                                                      const float* norm) {
  const auto score = Vector::multiply(Vector::template values<dtype>(w), Vector::load_unaligned(norm));
  return Vector::minimum(Vector::both(Vector::bits(score), Vector::all_of(0x7fffffff)),
                         Vector::all_of(0x7f800001));
}

// Unit `unit` of 2 * kLanes columns. Steps: store(words, at, a, b): bits of a <= b; store_next(..): of lane i
// <= lane i + 1; rotate<r>: inside 128 bits, lane i receives lane i + r mod 4.
template <class Vector, Dtype dtype>
WANDA_STEP inline void nm_compare_unit(const typename Element<dtype>::Bits* w, const float* norm,
                                       int64_t unit, NmComparisons4& out) {
  using Steps = NmSteps<Vector>;
  for (int64_t half = 0; half < 2; ++half) {
    const int64_t from = half * Vector::kLanes;
    const auto key = nm_score_keys<Vector, dtype>(w + from, norm + from);
    Steps::store_next(out.next, 2 * unit + half, key);
    Steps::store(out.across, 2 * unit + half, key, Steps::template rotate<2>(key));
  }
}

template <class Vector, Dtype dtype>
WANDA_STEP inline void nm_compare_unit(const typename Element<dtype>::Bits* w, const float* norm,
                                       int64_t unit, NmComparisons8& out) {
  using Steps = NmSteps<Vector>;
  const auto first = nm_score_keys<Vector, dtype>(w, norm);
  const auto second = nm_score_keys<Vector, dtype>(w + Vector::kLanes, norm + Vector::kLanes);
  const auto x = Steps::even_quads(first, second), y = Steps::odd_quads(first, second);
  const auto y2 = Steps::template rotate<2>(y);
  Steps::store_next(out.next_x, unit, x);
  Steps::store_next(out.next_y, unit, y);
  Steps::store(out.across_x, unit, x, Steps::template rotate<2>(x));
  Steps::store(out.across_y, unit, y, y2);
  Steps::store(out.against[0], unit, x, y);
  Steps::store(out.against[1], unit, x, Steps::template rotate<1>(y));
  Steps::store(out.against[2], unit, x, y2);
  Steps::store(out.against[3], unit, x, Steps::template rotate<3>(y));
}

// `count` columns of `rows` rows; w[r] and norm point at the first.
template <class Vector, Dtype dtype, int rows, class Comparisons>
WANDA_PASS void nm_compare(const typename Element<dtype>::Bits* const* w, const float* norm, int64_t count,
                           Comparisons* out) {
  constexpr int64_t kUnit = 2 * Vector::kLanes;
  const int64_t units = count / kUnit;
  for (int64_t u = 0; u < units; ++u) {
    for (int r = 0; r < rows; ++r)
      nm_compare_unit<Vector, dtype>(w[r] + u * kUnit, norm + u * kUnit, u, out[r]);
  }
  const int64_t left = count % kUnit;
  if (left != 0) {
    float last_norm[kUnit] = {};
    std::memcpy(last_norm, norm + units * kUnit, static_cast<size_t>(left) * sizeof(*norm));
    for (int r = 0; r < rows; ++r) {
      typename Element<dtype>::Bits last_w[kUnit] = {};
      std::memcpy(last_w, w[r] + units * kUnit, static_cast<size_t>(left) * sizeof(*w[r]));
      nm_compare_unit<Vector, dtype>(last_w, last_norm, units, out[r]);
    }
  }
}

// ---- Step 2: decisions.

constexpr uint64_t kLane0 = 0x1111111111111111u;  // bit 0 of every nibble
constexpr uint64_t kLanes01 = 0x3333333333333333u;
constexpr uint64_t kLanes012 = 0x7777777777777777u;

// Lane i of every nibble receives lane i - r mod 4.
inline uint64_t rotate_nibbles_1(uint64_t v) { return (v << 1 & ~kLane0) | (v >> 3 & kLane0); }
inline uint64_t rotate_nibbles_2(uint64_t v) { return (v << 2 & ~kLanes01) | (v >> 2 & kLanes01); }
inline uint64_t rotate_nibbles_3(uint64_t v) { return (v << 3 & ~kLanes012) | (v >> 1 & kLanes012); }

inline uint64_t majority(uint64_t a, uint64_t b, uint64_t c) { return (a & b) | ((a | b) & c); }

// Lanes 2, 3 from lanes 0, 1: i + 2 comes before i unless i comes before i + 2.
inline uint64_t complete_across(uint64_t v) { return (v & kLanes01) | (~(v << 2) & ~kLanes01); }

template <int n>
inline uint64_t nm_at_least_of_3(uint64_t a, uint64_t b, uint64_t c) {
  return n == 1 ? a | b | c : n == 2 ? majority(a, b, c) : a & b & c;
}

using NmDecide4 = void (*)(const NmComparisons4&, NmBits&);
using NmDecide8 = void (*)(const NmComparisons8&, NmBits&);

template <int n>
void nm_decide_4(const NmComparisons4& c, NmBits& out) {
  for (int64_t i = 0; i < kNmBlock / 64; ++i) {
    const uint64_t next = c.next[i];
    const uint64_t before = ~rotate_nibbles_1(next);
    const uint64_t across = complete_across(c.across[i]);
    out.word[i] = nm_at_least_of_3<n>(next, before, across);
  }
}

// At least n of seven bits: three full adders give the sum bits one, two, four.
template <int n>
inline uint64_t at_least(uint64_t a, uint64_t b, uint64_t c, uint64_t d, uint64_t e, uint64_t f, uint64_t g) {
  const uint64_t abc = a ^ b ^ c;
  const uint64_t def = d ^ e ^ f;
  const uint64_t one = abc ^ def ^ g;
  const uint64_t carry0 = majority(a, b, c);
  const uint64_t carry1 = majority(d, e, f);
  const uint64_t carry2 = majority(abc, def, g);
  const uint64_t two = carry0 ^ carry1 ^ carry2;
  const uint64_t four = majority(carry0, carry1, carry2);
  return n == 1   ? one | two | four
         : n == 2 ? two | four
         : n == 3 ? (one & two) | four
         : n == 4 ? four
         : n == 5 ? four & (one | two)
         : n == 6 ? four & two
                  : four & two & one;
}

// Nibble i of `v` (32 bits) to byte i.
inline uint64_t spread_nibbles(uint64_t v) {
  v = (v | v << 16) & 0x0000ffff0000ffffu;
  v = (v | v << 8) & 0x00ff00ff00ff00ffu;
  return (v | v << 4) & 0x0f0f0f0f0f0f0f0fu;
}

template <int n>
void nm_decide_8(const NmComparisons8& c, NmBits& out) {
  uint64_t x[kNmBlock / 128];
  uint64_t y[kNmBlock / 128];
  for (int64_t i = 0; i < kNmBlock / 128; ++i) {
    const uint64_t r0 = c.against[0][i];
    const uint64_t r1 = c.against[1][i];
    const uint64_t r2 = c.against[2][i];
    const uint64_t r3 = c.against[3][i];
    x[i] = at_least<n>(c.next_x[i], ~rotate_nibbles_1(c.next_x[i]), complete_across(c.across_x[i]), r0, r1,
                       r2, r3);
    y[i] = at_least<n>(c.next_y[i], ~rotate_nibbles_1(c.next_y[i]), complete_across(c.across_y[i]), ~r0,
                       ~rotate_nibbles_1(r1), ~rotate_nibbles_2(r2), ~rotate_nibbles_3(r3));
  }
  for (int64_t i = 0; i < kNmBlock / 128; ++i) {
    out.word[2 * i] = spread_nibbles(x[i] & 0xffffffffu) | spread_nibbles(y[i] & 0xffffffffu) << 4;
    out.word[2 * i + 1] = spread_nibbles(x[i] >> 32) | spread_nibbles(y[i] >> 32) << 4;
  }
}

inline NmDecide4 nm_decide_for(int64_t n, const NmComparisons4&) {
  return n == 1 ? &nm_decide_4<1> : n == 2 ? &nm_decide_4<2> : &nm_decide_4<3>;
}

inline NmDecide8 nm_decide_for(int64_t n, const NmComparisons8&) {
  constexpr NmDecide8 kDecide[] = {&nm_decide_8<1>, &nm_decide_8<2>, &nm_decide_8<3>, &nm_decide_8<4>,
                                   &nm_decide_8<5>, &nm_decide_8<6>, &nm_decide_8<7>};
  return kDecide[n - 1];
}

// Steps 1 and 2.
template <class Vector, Dtype dtype, int m>
class NmSelect {
  using Comparisons = typename NmComparisonsOf<m>::Type;

 public:
  static constexpr int kRows = kNmRows;  // that run() takes side by side

  NmSelect(const float* norm, int64_t, int64_t n) : norm_(norm), decide_(nm_decide_for(n, Comparisons{})) {}

  // `count` columns of `rows` rows from `column` on, count <= kNmBlock, rows <= kNmRows; w[r] points at the
  // first.
  template <int rows>
  void run(const typename Element<dtype>::Bits* const* w, int64_t column, int64_t count, NmBits* bits) {
    nm_compare<Vector, dtype, rows>(w, norm_ + column, count, comparisons_);
    for (int r = 0; r < rows; ++r) decide_(comparisons_[r], bits[r]);
  }

 private:
  const float* norm_;
  Comparisons comparisons_[kNmRows] = {};
  void (*decide_)(const Comparisons&, NmBits&);
};

template <class Vector, Dtype dtype, int m>
struct NmSelectFor {
  using Type = NmSelect<Vector, dtype, m>;
};

// ---- Step 3 and the rows.

// Rows row .. row + rows - 1.
template <class Vector, Dtype dtype, int rows, class Select>
void nm_fast_rows(const NmParams& p, int64_t row, Select& select, NmBits* bits) {
  using T = typename Element<dtype>::Bits;
  NmSums sums[rows];
  for (int64_t column = 0; column < p.cols; column += kNmBlock) {
    const int64_t count = p.cols - column < kNmBlock ? p.cols - column : kNmBlock;
    const T* w[rows];
    for (int r = 0; r < rows; ++r) w[r] = static_cast<const T*>(p.weight) + (row + r) * p.row_stride + column;
    select.template run<rows>(w, column, count, bits);
    for (int r = 0; r < rows; ++r) nm_apply<Vector, dtype>(p, row + r, column, count, bits[r], sums[r]);
  }
  for (int r = 0; r < rows && p.score_sums != nullptr; ++r) sums[r].store(p.score_sums + 2 * (row + r));
}

template <class Vector, Dtype dtype, int m>
void nm_fast(const NmParams& p, int64_t begin, int64_t end) {
  using Select = typename NmSelectFor<Vector, dtype, m>::Type;
  Select select(p.norm, p.cols, p.n);
  NmBits bits[Select::kRows] = {};
  int64_t row = begin;
  for (; row + Select::kRows <= end; row += Select::kRows) {
    nm_fast_rows<Vector, dtype, Select::kRows>(p, row, select, bits);
  }
  for (; row < end; ++row) nm_fast_rows<Vector, dtype, 1>(p, row, select, bits);
}

inline bool nm_any_negative(const float* norm, int64_t cols) {
  int32_t any = 0;
  for (int64_t j = 0; j < cols; ++j) any |= norm[j] < 0.0f;
  return any != 0;
}

template <class Vector, Dtype dtype>
void nm_rows(const NmParams& p, int64_t begin, int64_t end) {
  if constexpr (Vector::kLanes > 1) {
    // The keys of the fast path drop the score's sign: right for -0 and NaN, wrong for negative norms.
    if ((p.m == 4 || p.m == 8) && !nm_any_negative(p.norm, p.cols)) {
      if (p.m == 4) {
        nm_fast<Vector, dtype, 4>(p, begin, end);
      } else {
        nm_fast<Vector, dtype, 8>(p, begin, end);
      }
      return;
    }
  }
  nm_general<Vector, dtype>(p, begin, end);
}

template <class Vector>
void nm_run(const NmParams& p, int64_t begin, int64_t end) {
  const HonourDenormals honour_denormals;
  by_dtype(p.dtype, [&](auto dtype) { nm_rows<Vector, decltype(dtype)::value>(p, begin, end); });
}

}  // namespace
}  // namespace wanda::cpu
