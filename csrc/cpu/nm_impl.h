// N:M selection: which M - N of every M consecutive columns have the smallest scores |w| * norm, lowest
// column first among equals. Included by nm_<isa>.cpp and pack_24_<isa>.cpp after the target pragma; one
// thread, row by row.
//
// Fast path (M = 4 or 8, no negative norm), on blocks of 1024 columns that stay in L1:
//   1. compare: the score's bits, sign cleared and NaN clamped to one value, are an int32 key that orders as
//      torch.sort does. In-register rotations compare every key with the others of its group; a tie goes to
//      the lower column by a bias of 1 on the lanes that wrap around. Only the bits of the comparisons are
//      stored, 16 (or 8) lanes at a time.
//   2. decide: 64 columns per word, bitwise adders count for each element how many of its group come after
//   it; it is
//      pruned if there are at least N. Plain C that compilers vectorise: about 0.1 operations a column.
//   3. apply: zero the pruned elements, or write the mask.
// Bytes moved: the row is read and written once (in place), or read once and a byte a column written (mask).
//
// General path (any M, any norm, and everything in the scalar build): M <= 32 ranks 16 groups side by side, M
// * M / 2 comparisons a group; a larger M finds the (M - N)-th smallest key by 32 counting passes, bit by
// bit, never quadratic.
#pragma once

#include "convert.h"
#include "nm.h"

namespace wanda::cpu {
namespace {

constexpr int64_t kNmBlock = 1024;

// Bit j: column j of the block is pruned. The last word is only read, by at().
struct alignas(64) NmBits {
  uint64_t word[kNmBlock / 64 + 1];

  // Bits j .. j + 31.
  uint32_t at(int64_t j) const {
    const uint64_t low = word[j / 64] >> (j % 64);
    const uint64_t high = word[j / 64 + 1] << 1 << (63 - j % 64);
    return static_cast<uint32_t>(low | high);
  }
  bool test(int64_t j) const { return (word[j / 64] >> (j % 64) & 1) != 0; }
};

// ---- Sums of squared scores. Column j adds to lane j % 32 and the lanes are added as a tree: the same bits
// for every instruction set and path.
constexpr int kNmSumLanes = 32;

struct alignas(64) NmSums {
  float pruned[kNmSumLanes] = {};
  float all[kNmSumLanes] = {};

  void store(float* out) {
    for (int half = kNmSumLanes / 2; half > 0; half /= 2) {
      for (int i = 0; i < half; ++i) {
        pruned[i] += pruned[i + half];
        all[i] += all[i + half];
      }
    }
    out[0] = pruned[0];
    out[1] = all[0];
  }
};

template <Dtype dtype>
void nm_add_sums(const typename Stored<dtype>::Type* w, const float* norm, int64_t column, int64_t count,
                 const NmBits& bits, NmSums& sums) {
  int64_t j = 0;
  while (j < count) {
    if ((column + j) % kNmSumLanes == 0 && count - j >= kNmSumLanes) {
      const uint32_t pruned = bits.at(j);
      for (int lane = 0; lane < kNmSumLanes; ++lane) {
        const float score = score_of(Stored<dtype>::load(w[j + lane]), norm[j + lane]);
        const float square = score * score;
        sums.all[lane] += square;
        sums.pruned[lane] += (pruned >> lane & 1) != 0 ? square : 0.0f;
      }
      j += kNmSumLanes;
    } else {
      const int lane = static_cast<int>((column + j) % kNmSumLanes);
      const float score = score_of(Stored<dtype>::load(w[j]), norm[j]);
      const float square = score * score;
      sums.all[lane] += square;
      sums.pruned[lane] += bits.test(j) ? square : 0.0f;
      ++j;
    }
  }
}

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

template <class Lanes, Dtype dtype, class Comparisons>
void nm_compare(const typename Stored<dtype>::Type* w, const float* norm, int64_t count, Comparisons& out) {
  constexpr int64_t kUnit = Lanes::kUnit;
  const int64_t units = count / kUnit;
  for (int64_t u = 0; u < units; ++u) {
    Lanes::template compare<dtype>(w + u * kUnit, norm + u * kUnit, u, out);
  }
  const int64_t left = count % kUnit;
  if (left != 0) {
    typename Stored<dtype>::Type last_w[kUnit] = {};
    float last_norm[kUnit] = {};
    std::memcpy(last_w, w + units * kUnit, static_cast<size_t>(left) * sizeof(*w));
    std::memcpy(last_norm, norm + units * kUnit, static_cast<size_t>(left) * sizeof(*norm));
    Lanes::template compare<dtype>(last_w, last_norm, units, out);
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

using NmDecide4 = void (*)(const NmComparisons4&, NmBits&);
using NmDecide8 = void (*)(const NmComparisons8&, NmBits&);

template <int n>
void nm_decide_4(const NmComparisons4& c, NmBits& out) {
  for (int64_t i = 0; i < kNmBlock / 64; ++i) {
    const uint64_t next = c.next[i];
    const uint64_t before = ~rotate_nibbles_1(next);
    const uint64_t across = complete_across(c.across[i]);
    out.word[i] = n == 1   ? next | before | across
                  : n == 2 ? majority(next, before, across)
                           : next & before & across;
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
template <class Lanes, Dtype dtype, int m>
class NmSelect {
 public:
  NmSelect(const float* norm, int64_t, int64_t n) : norm_(norm), decide_(nm_decide_for(n, comparisons_)) {}

  // `count` columns from `column` on, count <= kNmBlock; w points at the first.
  void operator()(const typename Stored<dtype>::Type* w, int64_t column, int64_t count, NmBits& bits) {
    nm_compare<Lanes, dtype>(w, norm_ + column, count, comparisons_);
    decide_(comparisons_, bits);
  }

 private:
  using Comparisons = typename NmComparisonsOf<m>::Type;
  const float* norm_;
  Comparisons comparisons_ = {};
  void (*decide_)(const Comparisons&, NmBits&);
};

// ---- Step 3 and the rows.

template <class Lanes, Dtype dtype>
void nm_apply(const NmParams& p, int64_t row, int64_t column, int64_t count, const NmBits& bits,
              NmSums& sums) {
  auto* w = static_cast<typename Stored<dtype>::Type*>(p.weight) + row * p.row_stride + column;
  if (p.score_sums != nullptr) nm_add_sums<dtype>(w, p.norm + column, column, count, bits, sums);
  if (p.mask == nullptr) {
    Lanes::zero_pruned(w, count, bits);
  } else {
    Lanes::write_mask(p.mask + row * p.cols + column, count, bits);
  }
}

// What instruction sets without intrinsics use, and the ends of blocks.
struct NmLanesScalar {
  static constexpr bool kFast = false;
  static constexpr int kBytes = 16;  // of a register

  template <class T>
  static void zero_pruned(T* w, int64_t count, const NmBits& bits) {
    for (int64_t from = 0; from < count; from += 64) {
      const int64_t left = count - from;
      uint64_t word = bits.word[from / 64] & (left < 64 ? (uint64_t{1} << left) - 1 : ~uint64_t{0});
      for (; word != 0; word &= word - 1) w[from + __builtin_ctzll(word)] = T{0};
    }
  }
  static void write_mask(bool* mask, int64_t count, const NmBits& bits) {
    for (int64_t j = 0; j < count; ++j) mask[j] = bits.test(j);
  }
};

template <class Lanes, Dtype dtype, int m>
void nm_fast(const NmParams& p, int64_t begin, int64_t end) {
  const auto* weight = static_cast<const typename Stored<dtype>::Type*>(p.weight);
  typename Lanes::template Select<dtype, m> select(p.norm, p.cols, p.n);
  NmBits bits = {};
  for (int64_t row = begin; row < end; ++row) {
    NmSums sums;
    for (int64_t column = 0; column < p.cols; column += kNmBlock) {
      const int64_t count = p.cols - column < kNmBlock ? p.cols - column : kNmBlock;
      select(weight + row * p.row_stride + column, column, count, bits);
      nm_apply<Lanes, dtype>(p, row, column, count, bits, sums);
    }
    if (p.score_sums != nullptr) sums.store(p.score_sums + 2 * row);
  }
}

// ---- The general path.

constexpr int64_t kNmBatch = 16;
constexpr int64_t kNmRankable = 32;

// As many groups side by side as a register holds: GCC 12 takes wider vectors apart element by element.
template <int bytes>
struct NmVector {
  typedef int32_t Type __attribute__((vector_size(bytes)));
};

template <Dtype dtype>
void nm_keys(const typename Stored<dtype>::Type* w, const float* norm, int64_t count, int32_t* keys) {
  for (int64_t j = 0; j < count; ++j) keys[j] = order_key(score_of(Stored<dtype>::load(w[j]), norm[j]));
}

// Byte j of `flags` (0 or 1) to bit j. Reads flags up to a multiple of eight.
inline void nm_pack_flags(const uint8_t* flags, int64_t count, NmBits& bits) {
  for (int64_t word = 0; word <= count / 64 && word < kNmBlock / 64; ++word) bits.word[word] = 0;
  for (int64_t j = 0; j < count; j += 8) {
    uint64_t eight;
    std::memcpy(&eight, flags + j, sizeof(eight));
    // Bit 8 i moves to bit 56 + i.
    bits.word[j / 64] |= (eight * 0x0102040810204080u >> 56) << (j % 64);
  }
}

template <class Lanes, Dtype dtype>
void nm_rank(const typename Stored<dtype>::Type* w, const float* norm, int64_t groups, int m, int prune,
             NmBits& bits) {
  alignas(64) int32_t flat[kNmRankable * kNmBatch];
  alignas(64) int32_t keys[kNmRankable][kNmBatch];
  uint8_t flags[kNmRankable * kNmBatch + 8];
  std::memset(flags + groups * m, 0, 8);
  nm_keys<dtype>(w, norm, groups * m, flat);
  for (int64_t g = 0; g < groups; ++g) {
    for (int j = 0; j < m; ++j) keys[j][g] = flat[g * m + j];
  }
  for (int64_t g = groups; g < kNmBatch; ++g) {
    for (int j = 0; j < m; ++j) keys[j][g] = 0;
  }
  using Keys = typename NmVector<Lanes::kBytes>::Type;
  constexpr int64_t kWidth = Lanes::kBytes / 4;
  for (int64_t from = 0; from < groups; from += kWidth) {
    const int64_t to = groups - from < kWidth ? groups : from + kWidth;
    for (int j = 0; j < m; ++j) {
      Keys key;
      std::memcpy(&key, keys[j] + from, sizeof(key));
      Keys rank = {};  // minus the rank: a comparison that holds is -1
      for (int i = 0; i < m; ++i) {
        Keys other;
        std::memcpy(&other, keys[i] + from, sizeof(other));
        rank += i < j ? other <= key : other < key;
      }
      for (int64_t g = from; g < to; ++g) flags[g * m + j] = -rank[g - from] < prune;
    }
  }
  nm_pack_flags(flags, groups * m, bits);
}

inline int64_t nm_count_below(const int32_t* keys, int64_t count, int32_t bound) {
  int64_t total = 0;
  for (int64_t from = 0; from < count; from += 1 << 20) {
    const int64_t to = count - from < 1 << 20 ? count : from + (1 << 20);
    int32_t below = 0;
    for (int64_t j = from; j < to; ++j) below += keys[j] < bound;
    total += below;
  }
  return total;
}

// The prune-th smallest key, 1 <= prune < m, built bit by bit from the top (offset so that it orders
// unsigned), and in `below` how many keys are smaller.
inline int32_t nm_threshold(const int32_t* keys, int64_t m, int64_t prune, int64_t& below) {
  constexpr uint32_t kOffset = 0x80000000u;
  uint32_t threshold = 0;
  below = 0;
  for (uint32_t bit = kOffset; bit != 0; bit >>= 1) {
    const int64_t count = nm_count_below(keys, m, static_cast<int32_t>((threshold | bit) ^ kOffset));
    if (count < prune) {
      threshold |= bit;
      below = count;
    }
  }
  return static_cast<int32_t>(threshold ^ kOffset);
}

// Not std::vector: no standard template may be instantiated behind a target pragma.
template <class T>
class NmBuffer {
 public:
  explicit NmBuffer(int64_t size) : data_(size > 0 ? new T[static_cast<size_t>(size)] : nullptr) {}
  ~NmBuffer() { delete[] data_; }
  NmBuffer(const NmBuffer&) = delete;
  NmBuffer& operator=(const NmBuffer&) = delete;
  T* data() { return data_; }

 private:
  T* data_;
};

template <class Lanes, Dtype dtype>
void nm_general(const NmParams& p, int64_t begin, int64_t end) {
  const auto* weight = static_cast<const typename Stored<dtype>::Type*>(p.weight);
  const int64_t prune = p.m - p.n;
  NmBuffer<int32_t> keys(p.m > kNmRankable ? p.m : 0);
  NmBits bits = {};
  for (int64_t row = begin; row < end; ++row) {
    const auto* w = weight + row * p.row_stride;
    NmSums sums;
    if (p.m <= kNmRankable) {
      for (int64_t column = 0; column < p.cols; column += kNmBatch * p.m) {
        const int64_t left = (p.cols - column) / p.m;
        const int64_t groups = left < kNmBatch ? left : kNmBatch;
        nm_rank<Lanes, dtype>(w + column, p.norm + column, groups, static_cast<int>(p.m),
                              static_cast<int>(prune), bits);
        nm_apply<Lanes, dtype>(p, row, column, groups * p.m, bits, sums);
      }
    } else {
      for (int64_t group = 0; group < p.cols; group += p.m) {
        nm_keys<dtype>(w + group, p.norm + group, p.m, keys.data());
        int64_t below;
        const int32_t threshold = nm_threshold(keys.data(), p.m, prune, below);
        int64_t equals =
            prune - below;  // still to prune among those equal to the threshold, lowest column first
        for (int64_t first = 0; first < p.m; first += kNmBlock) {
          const int64_t count = p.m - first < kNmBlock ? p.m - first : kNmBlock;
          uint8_t flags[kNmBlock + 8] = {};
          for (int64_t j = 0; j < count; ++j) {
            const int32_t key = keys.data()[first + j];
            const bool equal = key == threshold && equals > 0;
            equals -= equal;
            flags[j] = key < threshold || equal;
          }
          nm_pack_flags(flags, count, bits);
          nm_apply<Lanes, dtype>(p, row, group + first, count, bits, sums);
        }
      }
    }
    if (p.score_sums != nullptr) sums.store(p.score_sums + 2 * row);
  }
}

inline bool nm_any_negative(const float* norm, int64_t cols) {
  int32_t any = 0;
  for (int64_t j = 0; j < cols; ++j) any |= norm[j] < 0.0f;
  return any != 0;
}

template <class Lanes, Dtype dtype>
void nm_rows(const NmParams& p, int64_t begin, int64_t end) {
  if constexpr (Lanes::kFast) {
    // The keys of the fast path drop the score's sign: right for -0 and NaN, wrong for negative norms.
    if ((p.m == 4 || p.m == 8) && !nm_any_negative(p.norm, p.cols)) {
      if (p.m == 4) {
        nm_fast<Lanes, dtype, 4>(p, begin, end);
      } else {
        nm_fast<Lanes, dtype, 8>(p, begin, end);
      }
      return;
    }
  }
  nm_general<Lanes, dtype>(p, begin, end);
}

template <class Lanes>
void nm_run(const NmParams& p, int64_t begin, int64_t end) {
  const HonourDenormals honour_denormals;
  switch (p.dtype) {
    case Dtype::kFloat32:
      return nm_rows<Lanes, Dtype::kFloat32>(p, begin, end);
    case Dtype::kBFloat16:
      return nm_rows<Lanes, Dtype::kBFloat16>(p, begin, end);
    case Dtype::kFloat16:
      return nm_rows<Lanes, Dtype::kFloat16>(p, begin, end);
  }
}

}  // namespace
}  // namespace wanda::cpu
