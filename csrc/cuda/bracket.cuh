// The bracket of buckets in which rows.cuh looks for the k-th smallest score, and sets of a thread's
// elements.
#pragma once

#include "platform.cuh"

namespace wanda::cuda {

constexpr int kBins = 128;
constexpr uint32_t kBucketBits = 16;
constexpr uint32_t kTopBucket = 0x7fff;  // NaN's

// A set of a thread's elements: word i holds quads(i) quads, eight but for the last word; element e of its
// quad q is bit 8 - quads(i) + q of byte e.
template <int kQuads>
struct ElementSet {
  static constexpr int kWords = (kQuads + 7) / 8;
  WANDA_DEVICE static constexpr int quads(int i) { return i < kQuads / 8 ? 8 : kQuads % 8; }
  uint32_t word[kWords];

  WANDA_DEVICE uint32_t count() const {
    uint32_t total = 0;
#pragma unroll
    for (int i = 0; i < kWords; ++i) total += __popc(word[i]);
    return total;
  }

  WANDA_DEVICE ElementSet without(const ElementSet& other) const {
    ElementSet rest;
#pragma unroll
    for (int i = 0; i < kWords; ++i) rest.word[i] = word[i] & ~other.word[i];
    return rest;
  }

  // The four elements of quad `quad` of word `i`, as the top bits of four bytes.
  WANDA_DEVICE uint32_t top_bits(int i, int quad) const { return word[i] << (quads(i) - 1 - quad); }
};

struct Bracket {
  uint32_t low, high;  // buckets [low, high)
  uint32_t below;      // elements in buckets before `low`
  bool found;
};

// log2 of the keys in a bin: a bucket, or the finest fraction of it that kBins bins cover the bracket with.
WANDA_DEVICE uint32_t fine_shift(const Bracket& bracket) {
  const uint32_t widest = __clz(bracket.high - bracket.low - 1);  // 32 for one bucket
  return kBucketBits - (widest - __clz(kBins - 1));
}

// What is known of rank k's bucket while a bracket is sought.
struct BracketSearch {
  uint32_t rank;
  uint32_t least = 0, most = 0x8000;  // it is in [least, most)
  uint32_t low, high;                 // the bracket: buckets [low, high)

  WANDA_DEVICE void set_around(float guess, float margin) {
    low = __float_as_uint(fmaxf(guess - margin, 0.0f)) >> kBucketBits;
    high = (__float_as_uint(fmaxf(guess + margin, 0.0f)) >> kBucketBits) + 1;
  }

  WANDA_DEVICE void clamp() {
    const uint32_t end = min(most, kTopBucket);
    low = min(max(low, least), end - 1);
    high = min(max(high, low + 1), end);
  }

  // After a bracket that does not do, with `below` elements before it and `inside` in it.
  WANDA_DEVICE void move(uint32_t below, uint32_t inside, int attempt, float half_width) {
    const bool is_lower = rank < below, is_higher = rank >= below + inside;
    const float low_score = __uint_as_float(low << kBucketBits),
                high_score = __uint_as_float(high << kBucketBits);
    if (!is_lower) least = is_higher ? high : low;
    if (!is_higher) most = is_lower ? low : high;
    if (attempt < 3) {
      // Along the bracket's density, with a tenth of the way as its error.
      const float edge = is_higher ? high_score : low_score;
      const float missing = static_cast<float>(static_cast<int>(rank - below - (is_higher ? inside : 0)));
      const float step = missing * (high_score - low_score) / static_cast<float>(max(inside, 1u));
      set_around(edge + step, half_width * (edge + step) + 0.1f * fabsf(step));
    } else if (most - least <= kBins) {
      low = least;
      high = most;
    } else {
      low = least + (most - least) / 3;
      high = least + (most - least) / 3 * 2;
    }
  }
};

}  // namespace wanda::cuda
