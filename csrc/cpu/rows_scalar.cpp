// Row selection in portable C++: plain loops that compilers vectorise for whatever the build's flags allow.
#include "rows_impl.h"

namespace wanda::cpu {
namespace {

struct Scalar {
  template <Dtype D>
  static void arrange_norm(const float* norm, float* out, int64_t blocks) {
    std::memcpy(out, norm, static_cast<size_t>(blocks * kBlock) * sizeof(float));
  }

  template <Dtype D>
  static int64_t make_keys(const typename Element<D>::Raw* w, const float* norm, uint16_t* keys,
                           int64_t blocks, int base, int span) {
    int64_t sum = 0;
    for (int64_t start = 0; start < blocks * kBlock; start += kBlock) {
      int32_t part = 0;
      for (int64_t i = start; i < start + kBlock; ++i) {
        const int32_t key = (bits_of(magnitude<D>(w[i]) * norm[i]) & 0x7fffffffu) >> 16;
        const int32_t over = key < base ? 0 : key - base;
        part += over < span ? over : span;
        keys[i] = static_cast<uint16_t>(key);
      }
      sum += part;
    }
    return sum;
  }

  template <Dtype D>
  static void count(const uint16_t* keys, int64_t blocks, const int32_t* limits, int64_t* counts,
                    const char*) {
    for (int t = 0; t < kLimits; ++t) counts[t] = 0;
    for (int64_t start = 0; start < blocks * kBlock; start += kBlock) {
      for (int t = 0; t < kLimits; ++t) {
        int16_t part = 0;
        for (int64_t i = start; i < start + kBlock; ++i) part += static_cast<int16_t>(keys[i]) < limits[t];
        counts[t] += part;
      }
    }
  }

  template <Dtype D>
  static int32_t column_of(int32_t place) {
    return place;
  }

  template <Dtype D, bool kMask, bool kSums>
  static int64_t write(typename Element<D>::Raw* w, bool* mask, const uint16_t* keys, const float* norm,
                       int64_t blocks, int below, int last, int32_t* columns, int32_t first_column,
                       Sums& sums, const char*) {
    int64_t listed = 0;
    for (int64_t start = 0; start < blocks * kBlock; start += kBlock) {
      int inside = 0;
      if constexpr (kSums) {
        for (int64_t i = 0; i < kBlock; ++i) {
          const float score = magnitude<D>(w[start + i]) * norm[start + i];
          sums.all += score * score;
          sums.pruned += keys[start + i] <= below ? score * score : 0.0f;
        }
      }
      for (int64_t i = start; i < start + kBlock; ++i) {
        if constexpr (kMask) {
          mask[i] = keys[i] <= below;
        } else {
          w[i] = keys[i] <= below ? 0 : w[i];
        }
        inside += (keys[i] > below) & (keys[i] <= last);
      }
      if (inside == 0) continue;
      for (int64_t i = start; i < start + kBlock; ++i) {
        if (keys[i] > below && keys[i] <= last) columns[listed++] = first_column + static_cast<int32_t>(i);
      }
    }
    return listed;
  }
};

}  // namespace

void rows_scalar(const RowsParams& params, int64_t begin, int64_t end) {
  run_rows<Scalar>(params, begin, end);
}

}  // namespace wanda::cpu
