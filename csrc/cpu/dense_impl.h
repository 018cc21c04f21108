// Products of a dense weight with a few rows of x, for any Vector. One thread, some of the weight's rows.
//
// A group of rows at a time shares the loads of x, and hides each other's latencies; what the next group will
// read is asked for meanwhile. Every output is added up in the same order, in one register of sums, whatever
// its group and slab: the same bits for any number of threads, and for a token in any batch. The last columns
// of a row, fewer than a register holds, come from a copy with zeros behind them: nothing is read past a
// weight. Bytes moved: the weight, once.
#pragma once

#include "packed_impl.h"

namespace wanda::cpu {
namespace {

// kLanes columns of each row, `stride` elements apart, with those of some rows of x.
template <class Vector, Dtype dtype, int rows, int tokens>
WANDA_STEP inline void dense_step(const typename Element<dtype>::Bits* weight, int64_t stride, const float* x,
                                  typename Vector::Floats (&sum)[rows][tokens]) {
  typename Vector::Floats values[rows];
  for (int r = 0; r < rows; ++r) values[r] = Vector::template values<dtype>(weight + r * stride);
  for (int b = 0; b < tokens; ++b) {
    const auto columns = Vector::load(x + b * Vector::kLanes);
    for (int r = 0; r < rows; ++r) sum[r][b] = Vector::multiply_add(values[r], columns, sum[r][b]);
  }
}

// Rows of x in a slab of x, row b of them into sums[r * batch + b].
template <class Vector, Dtype dtype, int rows, int tokens, int slab>
void dense_group(const PackedWeight& w, int64_t row, const float* x, int64_t batch, float* sums) {
  using Bits = typename Element<dtype>::Bits;
  constexpr int64_t kLanes = Vector::kLanes, kLine = 64 / int64_t{sizeof(Bits)};
  const Bits* weight = static_cast<const Bits*>(w.values) + row * w.cols;
  typename Vector::Floats sum[rows][tokens];
  for (auto& one : sum) {
    for (auto& lanes : one) lanes = Vector::zero();
  }
  int64_t j = 0;
  for (; j + kLine <= w.cols; j += kLine) {
    for (int r = 0; r < rows; ++r) prefetch_l2(weight + (rows + r) * w.cols + j);
#pragma GCC unroll 4
    for (int64_t k = 0; k < kLine; k += kLanes) {
      dense_step<Vector, dtype>(weight + j + k, w.cols, x + (j + k) * slab, sum);
    }
  }
  for (; j + kLanes <= w.cols; j += kLanes) {
    dense_step<Vector, dtype>(weight + j, w.cols, x + j * slab, sum);
  }
  if (j < w.cols) {
    alignas(64) Bits rest[rows * kLanes] = {};
    for (int r = 0; r < rows; ++r) {
      std::memcpy(rest + r * kLanes, weight + r * w.cols + j, static_cast<size_t>(w.cols - j) * sizeof(Bits));
    }
    dense_step<Vector, dtype>(rest, kLanes, x + j * slab, sum);
  }
  for (int r = 0; r < rows; ++r) {
    for (int b = 0; b < tokens; ++b) sums[r * batch + b] = static_cast<float>(Vector::sum(sum[r][b]));
  }
}

template <class Vector, Dtype dtype, int slab>
void dense_rows(const PackedWeight& w, const float* x, int64_t batch, float* sums, int64_t begin,
                int64_t end) {
  constexpr bool kWide = Vector::kLanes == 16;                    // AVX-512: 32 registers, else 16
  constexpr int kTokens = kWide || slab <= 4 ? slab : 4;          // at once
  constexpr int kRows = kTokens == 1 ? 8 : kTokens == 2 ? 4 : 3;  // what the registers hold
  int64_t row = begin;
  const auto slabs = [&](auto rows) {
    for (int64_t b = 0; b < batch; b += kTokens) {
      const float* columns = x + b / slab * slab * packed_columns(w) + b % slab * Vector::kLanes;
      dense_group<Vector, dtype, decltype(rows)::value, kTokens, slab>(w, row, columns, batch,
                                                                       sums + row * batch + b);
    }
    row += decltype(rows)::value;
  };
  while (row + kRows <= end) slabs(Constant<kRows>{});
  while (row < end) slabs(Constant<1>{});
}

// As Kernels::packed_product; x in float32, in blocks of kLanes columns.
template <class Vector>
void dense_product(const PackedWeight& w, const void* x, int64_t batch, float* sums, int64_t begin,
                   int64_t end) {
  by_dtype(w.dtype, [&](auto dtype) {
    packed_by_slab(batch, [&](auto slab) {
      dense_rows<Vector, decltype(dtype)::value, decltype(slab)::value>(w, static_cast<const float*>(x),
                                                                        batch, sums, begin, end);
    });
  });
}

}  // namespace
}  // namespace wanda::cpu
