// What the paths of N:M selection share: a block's decisions as bits, their application, the sums of squared
// scores.
#pragma once

#include "isa.h"
#include "scalar.h"

namespace wanda::cpu {
namespace {

constexpr int64_t kNmBlock = 1024;  // columns
// Rows that go side by side, 64 to 256 bytes of each in turn: norms of 8192 columns fill the L1 cache by
// themselves, and four rows share what they fetch from L2. Whole blocks of 2 KiB in turn would break the
// hardware's prefetch streams: an in-place pass takes 0.50 x memcpy row by row or side by side, 0.6-0.8 in
// blocks.
constexpr int kNmRows = 4;

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
void nm_add_sums(const typename Element<dtype>::Bits* w, const float* norm, int64_t column, int64_t count,
                 const NmBits& bits, NmSums& sums) {
  int64_t j = 0;
  while (j < count) {
    if ((column + j) % kNmSumLanes == 0 && count - j >= kNmSumLanes) {
      const uint32_t pruned = bits.at(j);
      for (int lane = 0; lane < kNmSumLanes; ++lane) {
        const float score = score_of(to_float<dtype>(w[j + lane]), norm[j + lane]);
        const float square = score * score;
        sums.all[lane] += square;
        sums.pruned[lane] += (pruned >> lane & 1) != 0 ? square : 0.0f;
      }
      j += kNmSumLanes;
    } else {
      const int lane = static_cast<int>((column + j) % kNmSumLanes);
      const float score = score_of(to_float<dtype>(w[j]), norm[j]);
      const float square = score * score;
      sums.all[lane] += square;
      sums.pruned[lane] += bits.test(j) ? square : 0.0f;
      ++j;
    }
  }
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

// What an instruction set does with decisions, and on nm_impl.h's fast path how it compares.
template <class Vector>
struct NmSteps;

template <class Vector, Dtype dtype>
void nm_apply(const NmParams& p, int64_t row, int64_t column, int64_t count, const NmBits& bits,
              NmSums& sums) {
  auto* w = static_cast<typename Element<dtype>::Bits*>(p.weight) + row * p.row_stride + column;
  if (p.score_sums != nullptr) nm_add_sums<dtype>(w, p.norm + column, column, count, bits, sums);
  if (p.mask == nullptr) {
    NmSteps<Vector>::zero_pruned(w, count, bits);
  } else {
    NmSteps<Vector>::write_mask(p.mask + row * p.cols + column, count, bits);
  }
}

template <>
struct NmSteps<Scalar> {
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

}  // namespace
}  // namespace wanda::cpu
