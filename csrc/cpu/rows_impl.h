// Row selection on the CPU: the driver, written once. The passes are in rows_scalar.h, and in rows_vector.h
// with rows_avx2.h or rows_avx512.h.
//
// Algorithm, for each row:
// 1. make_keys: key = the top 16 bits of the float32 score without the sign: 128 keys to a factor of two, in
//    the order of the scores. The same pass adds up clamped keys, from which the predictor guesses the
//    threshold (rows_predictor.h).
// 2. count: the keys below each of eight thresholds around the guess, in one pass. The gap that holds k is
//    nearly always one key wide (0.2 % of a row). A miss, about 1 row in 50, goes on in doubling steps and
//    then splits by nine: a bad guess costs passes, at most seven or so, never exactness.
// 3. write: prunes the keys below the gap, and lists the columns inside it, about 8 of 4096.
// 4. finish: float32 scores of the listed columns, ranked with ties by column.
// Where one key holds more than 1/64 of the row (constant rows, plateaus) the row goes through dense():
// float32 scores of all columns and a bisection on counts. The same path serves negative norms, whose scores
// are negative. All-equal rows cost three times a normal row, and no input is quadratic.
//
// Assumptions: norms and weights may be anything, NaN included (NaNs are the largest and equal among each
// other); columns stay below 2^31; float32 arithmetic is IEEE with denormals, and the build does not contract
// a * b + c.
//
// One thread's role: its rows one after the other; what it learns about one row's threshold it uses for the
// next.
//
// Bytes: W is read once from memory and written once (in place), and the next row is prefetched into L2, one
// half while counting and one half while writing: without that the first pass waits for memory (bfloat16 on
// Zen 4: 1.5 instead of 1.1 x memcpy; into L1 is worse than L2). Keys (2 bytes a column) and norms (4) stay
// in L1 or L2.
#pragma once

#include <cstdint>
#include <cstring>
#include <new>

#include "isa.h"
#include "rows_predictor.h"
#include "rows_scores.h"
#include "scalar.h"

namespace wanda::cpu {
namespace {

constexpr int64_t kBlock = 64;      // columns that a pass handles at once; rows are padded to it
constexpr int kLimits = 8;          // thresholds counted in one pass
constexpr int kTop = 0x8000;        // one past the largest key
constexpr int64_t kRankLimit = 64;  // candidates that are ranked all against all
constexpr int64_t kDenseStep = 1024;

struct Sums {
  double pruned = 0;
  double all = 0;
};

// A 64-byte aligned buffer that is left uninitialised.
template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t size)
      : data_(static_cast<T*>(::operator new(static_cast<size_t>(size) * sizeof(T), std::align_val_t{64}))) {}
  ~Buffer() { ::operator delete(data_, std::align_val_t{64}); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  T* get() const { return data_; }

 private:
  T* data_;
};

// Lists the places of set bits in the order of their columns: kLanes = 0 where places are columns, else 2 *
// kLanes places hold the columns 0, kLanes, 1, kLanes + 1, ... of their group.
template <int kLanes>
inline int64_t list_places(uint64_t bits, int32_t place, int32_t* places, int64_t listed) {
  if constexpr (kLanes == 0) {
    for (; bits != 0; bits &= bits - 1) places[listed++] = place + __builtin_ctzll(bits);
  } else {
    constexpr uint64_t kEven = 0x5555555555555555u;
    constexpr uint64_t kGroup = ~0ull >> (64 - 2 * kLanes);
    for (int shift = 0; shift < 64; shift += 2 * kLanes) {
      const uint64_t group = bits & kGroup << shift;
      for (uint64_t a = group & kEven; a != 0; a &= a - 1) places[listed++] = place + __builtin_ctzll(a);
      for (uint64_t b = group & ~kEven; b != 0; b &= b - 1) places[listed++] = place + __builtin_ctzll(b);
    }
  }
  return listed;
}

// Appends the places of a block's set bits. A hit in one of several blocks is what branches predict worst, so
// one place is stored in any case and counts only if there is one; two in a block are rare.
template <int kLanes>
inline int64_t append_places(uint64_t bits, int32_t place, int32_t* places, int64_t listed) {
  if ((bits & (bits - 1)) != 0) return list_places<kLanes>(bits, place, places, listed);
  places[listed] = place + __builtin_ctzll(bits | 1ull << 63);
  return listed + (bits != 0);
}

template <int kLanes>
inline int32_t column_at(int32_t place) {
  if constexpr (kLanes == 0) {
    return place;
  } else {
    constexpr int32_t kMask = 2 * kLanes - 1;
    return (place & ~kMask) + (place & 1) * kLanes + (place & kMask) / 2;
  }
}

// Where a row's threshold lies: count(key < low) = count_low <= k <= count_high = count(key < high).
struct Bracket {
  int low = 0;
  int high = kTop;
  int64_t count_low = 0;
  int64_t count_high = 0;
};

// The passes of an instruction set: make_keys, count, write, and Lanes, a vector of int32.
template <class Vector>
struct RowsSteps;

// For column_at, list_places: registers of two halves give keys of pairs (rows_avx512.h), bfloat16 in order.
template <class Vector, Dtype D>
constexpr int kKeyLanes = D == Dtype::kBFloat16 || Vector::kLanes == 1 ? 0 : Vector::kLanes;

template <class Vector, Dtype D, bool kMask, bool kSums>
class RowSelect {
  using Steps = RowsSteps<Vector>;
  using Bits = typename Element<D>::Bits;

 public:
  explicit RowSelect(const RowsParams& params)
      : params_(params),
        whole_(params.cols / kBlock),
        rest_(params.cols % kBlock),
        list_limit_(max_of(64, params.cols / 64)),
        padded_((whole_ + (rest_ > 0)) * kBlock),
        inverse_cols_(1.0f / static_cast<float>(params.cols)),
        norm_(padded_),
        keys_(padded_),
        columns_(padded_ + kBlock),
        values_(padded_ + kBlock) {
    float tail[kBlock];
    arrange_norm(params.norm, norm_.get(), whole_);
    if (rest_ > 0) {
      // Columns past the end get NaN scores: below no threshold, so never counted, and finish() never sees
      // them.
      for (int64_t i = 0; i < kBlock; ++i) tail[i] = float_of_bits(0x7fffffffu);
      std::memcpy(tail, params.norm + whole_ * kBlock, static_cast<size_t>(rest_) * sizeof(float));
      arrange_norm(tail, norm_.get() + whole_ * kBlock, 1);
      for (int64_t i = rest_; i < kBlock; ++i) tail[i] = 0;
      arrange_norm(tail, norm_rest_, 1);
    }
    for (int64_t i = 0; i < params.cols; ++i) negative_ |= params.norm[i] < 0;
  }

  void run(int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      Bits* w = static_cast<Bits*>(params_.weight) + row * params_.row_stride;
      mask_ = kMask ? params_.mask + row * params_.cols : nullptr;
      next_ = reinterpret_cast<const char*>(row + 1 < end ? w + params_.row_stride : w);
      half_ = next_ + whole_ * kBlock * static_cast<int64_t>(sizeof(Bits)) / 2;
      sums_ = Sums{};
      if (params_.k <= 0 || params_.k >= params_.cols) {
        std::memset(keys_.get(), 0, static_cast<size_t>(padded_) * sizeof(uint16_t));
        write(w, params_.k <= 0 ? -1 : kTop - 1, -1);
      } else if (negative_) {
        dense(w, 0, 0xffffffffu);
      } else {
        select(w);
      }
      if constexpr (kSums) {
        params_.score_sums[2 * row] = static_cast<float>(sums_.pruned);
        params_.score_sums[2 * row + 1] = static_cast<float>(sums_.all);
      }
    }
  }

 private:
  static void arrange_norm(const float* norm, float* out, int64_t blocks) {
    for (int64_t i = 0; i < blocks * kBlock; ++i) out[place_in_pair<Vector, D>(i)] = norm[i];
  }

  void select(Bits* w) {
    const int64_t k = params_.k;
    const float mean = make_keys(w);
    const float guess = predictor_.predict(mean);
    Bracket bracket;
    bracket.count_high = params_.cols;
    for (int pass = 0; !good_enough(bracket); ++pass) probe(bracket, pass, guess);

    const int64_t inside = bracket.count_high - bracket.count_low;
    const float width = static_cast<float>(bracket.high - bracket.low);
    const float part =
        static_cast<float>(k - bracket.count_low) / static_cast<float>(inside > 0 ? inside : 1);
    predictor_.learn(mean, guess, static_cast<float>(bracket.low) + part * width,
                     static_cast<float>(inside) / (width * static_cast<float>(params_.cols)));
    if (k == bracket.count_low) {
      write(w, bracket.low - 1, bracket.low - 1);
    } else if (k == bracket.count_high) {
      write(w, bracket.high - 1, bracket.high - 1);
    } else if (inside <= list_limit_) {
      finish(w, write(w, bracket.low - 1, bracket.high - 1), k - bracket.count_low, bracket);
    } else {
      const uint32_t low = static_cast<uint32_t>(bracket.low) << 16;
      const uint32_t high = (static_cast<uint32_t>(bracket.high) << 16) - 1;
      dense(w, bracket.low >= kFirstNan ? 0xffffffffu : low | 0x80000000u,
            bracket.high > kFirstNan ? 0xffffffffu : high | 0x80000000u);
    }
  }

  // Writes the row's keys and returns a robust location of them.
  float make_keys(const Bits* w) {
    uint16_t* keys = keys_.get();
    const int base = predictor_.base();
    const int span = predictor_.span();
    int64_t sum = Steps::template make_keys<D>(w, norm_.get(), keys, whole_, base, span);
    if (rest_ > 0) {
      alignas(64) Bits stage[kBlock] = {};
      std::memcpy(stage, w + whole_ * kBlock, static_cast<size_t>(rest_) * sizeof(Bits));
      sum += Steps::template make_keys<D>(stage, norm_.get() + whole_ * kBlock, keys + whole_ * kBlock, 1,
                                          base, span);
      sum -= (kBlock - rest_) * span;
    }
    return static_cast<float>(sum) * inverse_cols_;
  }

  bool good_enough(const Bracket& bracket) const {
    return params_.k == bracket.count_low || params_.k == bracket.count_high ||
           bracket.high - bracket.low <= 1 || bracket.low == kFirstNan ||
           bracket.count_high - bracket.count_low <= list_limit_;
  }

  // Counts eight thresholds inside the bracket and narrows it to the gap that holds k. No branch depends on
  // the counts.
  void probe(Bracket& bracket, int pass, float guess) {
    int32_t limits[kLimits + 2];
    int64_t counts[kLimits + 2];
    const float unit = predictor_.error();
    if (unit > 0 && pass == 0) {
      static constexpr float kPlaces[kLimits] = {-3.0f, -1.8f, -0.9f, -0.28f,
                                                 0.28f, 0.9f,  1.8f,  3.0f};  // in mean errors
      for (int i = 0; i < kLimits; ++i)
        limits[i + 1] = static_cast<int32_t>(guess + kPlaces[i] * unit + 0.5f);
    } else if (unit > 0 && pass == 1 && (bracket.high == kTop || bracket.low == 0)) {
      // A miss: go away from the guess in doubling steps.
      const int32_t step = static_cast<int32_t>(unit) + 1;
      for (int i = 0; i < kLimits; ++i) {
        limits[i + 1] =
            bracket.high == kTop ? bracket.low + (step << i) : bracket.high - (step << (kLimits - 1 - i));
      }
    } else {
      for (int i = 0; i < kLimits; ++i) {
        limits[i + 1] = bracket.low + (bracket.high - bracket.low) * (i + 1) / (kLimits + 1);
      }
    }
    const int32_t most = bracket.high < kFirstNan ? bracket.high : kFirstNan;
    for (int i = 1; i <= kLimits; ++i) {
      limits[i] = limits[i] <= bracket.low ? bracket.low + 1 : limits[i];
      limits[i] = limits[i] > most ? most : limits[i];
    }
    limits[0] = bracket.low;
    counts[0] = bracket.count_low;
    limits[kLimits + 1] = bracket.high;
    counts[kLimits + 1] = bracket.count_high;
    Steps::template count<D>(keys_.get(), padded_ / kBlock, limits + 1, counts + 1, next_);
    int at = 0;
    for (int i = 1; i <= kLimits; ++i) at += counts[i] <= params_.k;
    bracket.low = limits[at];
    bracket.count_low = counts[at];
    bracket.high = limits[at + 1];
    bracket.count_high = counts[at + 1];
  }

  // Prunes keys <= below; returns how many columns with below < key <= last it has listed, ascending.
  int64_t write(Bits* w, int below, int last) {
    int32_t* columns = columns_.get();
    int64_t listed = Steps::template write<D, kMask, kSums>(w, mask_, keys_.get(), norm_.get(), whole_, below,
                                                            last, columns, 0, sums_, half_);
    if (rest_ > 0) {
      const int64_t start = whole_ * kBlock;
      alignas(64) Bits stage[kBlock] = {};
      alignas(64) bool mask_stage[kBlock];
      std::memcpy(stage, w + start, static_cast<size_t>(rest_) * sizeof(Bits));
      listed += Steps::template write<D, kMask, kSums>(stage, mask_stage, keys_.get() + start, norm_rest_, 1,
                                                       below, last, columns + listed,
                                                       static_cast<int32_t>(start), sums_, half_);
      if constexpr (kMask) {
        std::memcpy(mask_ + start, mask_stage, static_cast<size_t>(rest_));
      } else {
        std::memcpy(w + start, stage, static_cast<size_t>(rest_) * sizeof(Bits));
      }
      while (listed > 0 && column_at<kKeyLanes<Vector, D>>(columns[listed - 1]) >= params_.cols) --listed;
    }
    return listed;
  }

  void prune_if(bool pruned, Bits* w, int64_t column) {
    if constexpr (kSums) {
      const float score = magnitude<D>(w[column]) * params_.norm[column];
      sums_.pruned += pruned ? score * score : 0.0f;
    }
    if constexpr (kMask) {
      mask_[column] = pruned;
    } else {
      w[column] = pruned ? 0 : w[column];
    }
  }

  // Prunes the `need` smallest of the listed columns, all those with keys inside the bracket, by their
  // float32 scores.
  void finish(Bits* w, int64_t listed, int64_t need, const Bracket& bracket) {
    int32_t* columns = columns_.get();
    uint32_t* values = values_.get();
    for (int64_t i = 0; i < listed; ++i) {
      columns[i] = column_at<kKeyLanes<Vector, D>>(columns[i]);
      values[i] = order_of(magnitude<D>(w[columns[i]]) * absolute(params_.norm[columns[i]]));
    }
    if (listed <= kRankLimit && bracket.high <= kFirstNan && bracket.high - bracket.low <= 512) {
      rank_and_prune(w, listed, need, static_cast<uint32_t>(bracket.low) << 16 | 0x80000000u);
      return;
    }
    const uint32_t limit = value_of_rank(values, listed, need - 1, 0, 0xffffffffu);
    int64_t ties = need - count_below(values, listed, limit);
    for (int64_t i = 0; i < listed; ++i) {
      prune_if(values[i] < limit || (values[i] == limit && ties-- > 0), w, columns[i]);
    }
  }

  // 25 bits of score and 6 of position make the candidates distinct: a column's rank is the number of smaller
  // ones.
  void rank_and_prune(Bits* w, int64_t listed, int64_t need, uint32_t origin) {
    using Lanes = typename Steps::Lanes;
    constexpr int64_t kCount = sizeof(Lanes) / sizeof(int32_t);
    const int32_t* columns = columns_.get();
    uint32_t* values = values_.get();
    for (int64_t i = 0; i < listed; ++i) values[i] = (values[i] - origin) << 6 | static_cast<uint32_t>(i);
    for (int64_t first = 0; first < listed; first += kCount) {
      Lanes own, rank = {};
      std::memcpy(&own, values + first, sizeof own);
      for (int64_t i = 0; i < listed; ++i) rank -= static_cast<int32_t>(values[i]) < own;
      const int64_t stop = min_of(listed, first + kCount);
      for (int64_t i = first; i < stop; ++i) prune_if(rank[i - first] < need, w, columns[i]);
    }
  }

  // The whole row by float32 scores: for plateaus, where one key holds much of the row, and for negative
  // norms. The threshold is known to lie in [low, high].
  void dense(Bits* w, uint32_t low, uint32_t high) {
    const int64_t cols = params_.cols;
    const float* norm = params_.norm;
    uint32_t* values = values_.get();
    for (int64_t i = 0; i < cols; ++i) values[i] = order_of(magnitude<D>(w[i]) * norm[i]);
    const uint32_t limit = value_of_rank(values, cols, params_.k - 1, low, high);
    int64_t ties = params_.k - count_below(values, cols, limit);
    int64_t cut = 0;  // equal scores before this column are pruned
    while (ties > 0) {
      const int64_t stop = min_of(cols, cut + kDenseStep);
      uint32_t equal = 0;
      for (int64_t i = cut; i < stop; ++i) equal += values[i] == limit;
      if (equal <= ties) {
        ties -= equal;
        cut = stop;
      } else {
        for (; ties > 0; ++cut) ties -= values[cut] == limit;
      }
    }
    if constexpr (kSums) {
      for (int64_t i = 0; i < cols; ++i) {
        const float square = magnitude<D>(w[i]) * norm[i] * (magnitude<D>(w[i]) * norm[i]);
        sums_.all += square;
        sums_.pruned += values[i] < limit || (values[i] == limit && i < cut) ? square : 0.0f;
      }
    }
    prune_to(w, values, 0, cut, limit);
    if (cut < cols) {
      if (limit > 0) {
        prune_to(w, values, cut, cols, limit - 1);
      } else if constexpr (kMask) {
        std::memset(mask_ + cut, 0, static_cast<size_t>(cols - cut));
      }
    }
  }

  void prune_to(Bits* w, const uint32_t* values, int64_t begin, int64_t end, uint32_t last) {
    for (int64_t i = begin; i < end; ++i) {
      if constexpr (kMask) {
        mask_[i] = values[i] <= last;
      } else {
        w[i] = values[i] <= last ? 0 : w[i];
      }
    }
  }

  const RowsParams& params_;
  const int64_t whole_;  // whole blocks of a row
  const int64_t rest_;   // columns after them
  const int64_t list_limit_;
  const int64_t padded_;
  const float inverse_cols_;
  Buffer<float> norm_;  // in the order of load_pair
  Buffer<uint16_t> keys_;
  Buffer<int32_t> columns_;
  Buffer<uint32_t> values_;
  alignas(64) float norm_rest_[kBlock];
  bool negative_ = false;
  bool* mask_ = nullptr;
  const char* next_ = nullptr;  // the next row's two halves, prefetched while counting and while writing
  const char* half_ = nullptr;
  Sums sums_;
  Predictor predictor_;
};

template <class Vector, Dtype D>
void rows_run_of(const RowsParams& params, int64_t begin, int64_t end) {
  if (params.mask != nullptr) {
    if (params.score_sums != nullptr) {
      RowSelect<Vector, D, true, true>(params).run(begin, end);
    } else {
      RowSelect<Vector, D, true, false>(params).run(begin, end);
    }
  } else if (params.score_sums != nullptr) {
    RowSelect<Vector, D, false, true>(params).run(begin, end);
  } else {
    RowSelect<Vector, D, false, false>(params).run(begin, end);
  }
}

template <class Vector>
void rows_run(const RowsParams& params, int64_t begin, int64_t end) {
  if (begin >= end) return;
  const HonourDenormals honour_denormals;
  by_dtype(params.dtype,
           [&](auto dtype) { rows_run_of<Vector, decltype(dtype)::value>(params, begin, end); });
}

}  // namespace
}  // namespace wanda::cpu
