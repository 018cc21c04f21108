// What swaps begin and end with: c = G p of some rows, and each row's error.
//
// The reference adds a column's products up in the order of G's rows, each sum rounded to float64, and so
// does a thread here: the tensor cores' order is their own. Two float32 numbers' product is exact, so that a
// fused multiply-add rounds as a product and a sum do. A row's error is a sum in the order of its columns.
//
// Products: a block takes 64 rows by 64 columns, a thread 8 by 4, whose sums stay in registers while tiles of
// 16 rows of G pass through shared memory, in turns: the next one is on its way to registers meanwhile. 7
// bytes come from L2 for 64 products (bfloat16); what a block waits for is the float64 units. Blocks that
// follow each other take the same columns of G.
//
// Errors: a block takes 32 rows. Its threads make terms of 64 columns, and a lane of the first warp adds
// those of a row up, while the others make the next ones.
#pragma once

#include "score.cuh"

namespace wanda::cuda {

WANDA_DEVICE double as_double(float value) { return static_cast<double>(value); }

struct ProductTile {
  alignas(
      16) double pruned[kProductDepth][kProductRows + 2];  // rows 4 banks apart, as whole columns are written
  alignas(16) double gram[kProductDepth][kProductCols];
};
static_assert(2 * sizeof(ProductTile) == kProductSharedBytes, "plan.h reckons with it");

template <Dtype kDtype>
struct ProductBlock {
  using Bits = typename Element<kDtype>::Bits;
  static constexpr int kDown = 8, kAcross = 4;
  static constexpr int kLoads = kProductDepth * kProductCols / kProductThreads;  // of a thread, of each tile
  static_assert(kProductRows == kProductCols &&
                    kProductRows / kDown * (kProductCols / kAcross) == kProductThreads,
                "");

  const RefineParams& params;
  const RefineBand& band;
  double sums[kDown][kAcross];
  float pruned[kLoads], gram[kLoads];  // of the next tile

  WANDA_DEVICE int64_t first_row() const { return int64_t{blockIdx.x} * kProductRows; }  // of the band
  WANDA_DEVICE int64_t first_column() const { return int64_t{blockIdx.y} * kProductCols; }
  WANDA_DEVICE static int own_row() {
    return static_cast<int>(threadIdx.x) / (kProductCols / kAcross) * kDown;
  }
  // Two columns side by side, and two half a tile on: a warp's loads of 16 bytes a lane have no gaps.
  WANDA_DEVICE static int own_column(int i) {
    return static_cast<int>(threadIdx.x) % (kProductCols / kAcross) * 2 + i / 2 * (kProductCols / 2) + i % 2;
  }

  // From G's row `depth` on.
  WANDA_DEVICE void load(int64_t depth) {
    const int thread = threadIdx.x;
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const int64_t k = depth + thread / kProductCols + i * (kProductThreads / kProductCols);
      const int64_t column = first_column() + thread % kProductCols;
      gram[i] =
          k < params.cols && column < params.cols ? __ldg(params.gram + k * params.cols + column) : 0.0f;
    }
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const int64_t k = depth + thread % kProductDepth;
      const int64_t row = first_row() + thread / kProductDepth + i * (kProductThreads / kProductDepth);
      pruned[i] = 0.0f;
      if (k < params.cols && row < band.rows) {
        const int64_t at = (band.first + row) * params.cols + k;
        if (params.mask[at]) pruned[i] = to_float<kDtype>(static_cast<const Bits*>(params.weight)[at]);
      }
    }
  }

  WANDA_DEVICE void store(ProductTile& tile) const {
    const int thread = threadIdx.x;
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      tile.gram[thread / kProductCols + i * (kProductThreads / kProductCols)][thread % kProductCols] =
          as_double(gram[i]);
      tile.pruned[thread % kProductDepth][thread / kProductDepth + i * (kProductThreads / kProductDepth)] =
          as_double(pruned[i]);
    }
  }

  WANDA_DEVICE void multiply(const ProductTile& tile) {
#pragma unroll
    for (int k = 0; k < kProductDepth; ++k) {
      double p[kDown], g[kAcross];
#pragma unroll
      for (int r = 0; r < kDown; ++r) p[r] = tile.pruned[k][own_row() + r];
#pragma unroll
      for (int i = 0; i < kAcross; ++i) g[i] = tile.gram[k][own_column(i)];
#pragma unroll
      for (int r = 0; r < kDown; ++r) {
#pragma unroll
        for (int i = 0; i < kAcross; ++i) sums[r][i] = __fma_rn(p[r], g[i], sums[r][i]);
      }
    }
  }

  WANDA_DEVICE void write() const {
#pragma unroll
    for (int r = 0; r < kDown; ++r) {
      const int64_t row = first_row() + own_row() + r;
#pragma unroll
      for (int i = 0; i < kAcross; ++i) {
        const int64_t column = first_column() + own_column(i);
        if (row < band.rows && column < params.cols) band.c[row * params.cols + column] = sums[r][i];
      }
    }
  }
};

template <Dtype kDtype>
__global__ void __launch_bounds__(kProductThreads, 3)
    refine_products_kernel(const RefineParams params, const RefineBand band) {
  WANDA_DYNAMIC_SHARED(memory);
  ProductTile* const tiles = reinterpret_cast<ProductTile*>(memory);
  ProductBlock<kDtype> block{params, band, {}, {}, {}};
  block.load(0);
  block.store(tiles[0]);
  __syncthreads();
  const bool has_rows = block.first_row() + block.own_row() < band.rows;
  int tile = 0;
  for (int64_t depth = kProductDepth;; depth += kProductDepth) {
    const bool is_last = depth >= params.cols;
    if (!is_last) block.load(depth);
    if (has_rows) block.multiply(tiles[tile]);
    if (is_last) break;
    tile ^= 1;
    block.store(tiles[tile]);
    __syncthreads();
  }
  block.write();
}

struct ErrorTerms {
  double of[kErrorRows][kErrorCols + 1];  // a column of it in different banks
};
static_assert(2 * sizeof(ErrorTerms) == kErrorSharedBytes, "plan.h reckons with it");

template <Dtype kDtype>
__global__ void __launch_bounds__(kErrorThreads)
    refine_errors_kernel(const RefineParams params, const RefineBand band) {
  constexpr int kRowsAtOnce = kErrorThreads / kErrorCols;
  WANDA_DYNAMIC_SHARED(memory);
  ErrorTerms* const terms = reinterpret_cast<ErrorTerms*>(memory);
  const int thread = threadIdx.x;
  const int64_t first_row = int64_t{blockIdx.x} * kErrorRows;
  double error = 0;
  int turn = 0;
  for (int64_t first = 0; first < params.cols; first += kErrorCols) {
    const int64_t column = first + thread % kErrorCols;
    const double diagonal = column < params.cols ? as_double(__ldg(band.diagonal + column)) : 0.0;
#pragma unroll
    for (int i = 0; i < kErrorRows / kRowsAtOnce; ++i) {
      const int row = thread / kErrorCols + i * kRowsAtOnce;
      double term = 0;
      if (column < params.cols && first_row + row < band.rows) {
        const int64_t at = (band.first + first_row + row) * params.cols + column;
        const double w = as_double(
            to_float<kDtype>(static_cast<const typename Element<kDtype>::Bits*>(params.weight)[at]));
        const double c = band.c[(first_row + row) * params.cols + column];
        if (params.mask[at]) {
          term = __dadd_rn(__dmul_rn(w, c), __dmul_rn(params.damping, __dmul_rn(__dmul_rn(w, w), diagonal)));
        }
      }
      terms[turn].of[row][thread % kErrorCols] = term;
    }
    __syncthreads();
    if (thread < kErrorRows) {
      const int count = static_cast<int>(min(int64_t{kErrorCols}, params.cols - first));
      for (int i = 0; i < count; ++i) error = __dadd_rn(error, terms[turn].of[thread][i]);
    }
    turn ^= 1;
  }
  if (thread < kErrorRows && first_row + thread < band.rows) {
    band.errors[(first_row + thread) * band.error_stride] = error;
  }
}

}  // namespace wanda::cuda
