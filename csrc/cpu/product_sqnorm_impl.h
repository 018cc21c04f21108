// Products and their column sums of squares. Included by isa_<set>.cpp, for whose set compilers
// vectorise it; one thread, one sequence.
//
// Token by token along a tile of columns: make y, store it, add its square to the tile's float32 sums. After
// kChunk counted tokens the sums go to float64 totals: the order and the rounding of sqnorm_impl.h. Loops
// that compilers vectorise. Bytes moved: a and b are read once, y is written once.
//
// A tile is as long as a row may be: tiles of 4096 columns, or eight rows made and then summed, took 1.2-1.3
// x as long outside the caches, and so did prefetching the next row. One thread, 8192 columns, silu(gate) *
// up and sums: 0.87 x (float32) and 1.2 x (bfloat16) the time of a product and a separate sum.
#pragma once

#include "sqnorm_impl.h"  // kChunk

namespace wanda::cpu {
namespace {

constexpr int64_t kProductTile = 16384;  // columns

template <Product product, Dtype dtype, bool counts>
void product_row(const typename Element<dtype>::Bits* __restrict a,
                 const typename Element<dtype>::Bits* __restrict b, float scale,
                 typename Element<dtype>::Bits* __restrict y, float* __restrict partial, int64_t cols) {
  for (int64_t j = 0; j < cols; ++j) {
    const float first = to_float<dtype>(a[j]), second = to_float<dtype>(b[j]);
    typename Element<dtype>::Bits made;
    if constexpr (product == Product::kScaleThenWeight) {
      made = from_float<dtype>(to_float<dtype>(from_float<dtype>(first * scale)) * second);
    } else if constexpr (product == Product::kUnitOffset) {
      made = from_float<dtype>(first * scale * (1.0f + second));
    } else {
      made = from_float<dtype>(first * second);
    }
    y[j] = made;
    if constexpr (counts) partial[j] += to_float<dtype>(made) * to_float<dtype>(made);
  }
}

template <Product product, Dtype dtype>
void product_tile(const ProductSqnormParams& p, int64_t sequence, int64_t column, int64_t cols) {
  using T = typename Element<dtype>::Bits;
  alignas(64) float partial[kProductTile];
  alignas(64) double total[kProductTile];
  for (int64_t j = 0; j < cols; ++j) {
    partial[j] = 0.0f;
    total[j] = 0.0;
  }
  const T* a = static_cast<const T*>(p.a) + sequence * p.a_sequence_stride + column;
  const T* b = static_cast<const T*>(p.b) + sequence * p.b_sequence_stride + column;
  T* y = static_cast<T*>(p.y) + sequence * p.tokens * p.cols + column;
  const bool* token_mask = p.token_mask == nullptr ? nullptr : p.token_mask + sequence * p.tokens;
  int64_t in_chunk = 0;
  for (int64_t token = 0; token < p.tokens; ++token) {
    const float scale = product == Product::kMultiply ? 1.0f : p.scale[sequence * p.tokens + token];
    const T* first = a + token * p.a_token_stride;
    const T* second = b + token * p.b_token_stride;
    if (token_mask != nullptr && !token_mask[token]) {
      product_row<product, dtype, false>(first, second, scale, y + token * p.cols, partial, cols);
      continue;
    }
    product_row<product, dtype, true>(first, second, scale, y + token * p.cols, partial, cols);
    if (++in_chunk == kChunk) {
      in_chunk = 0;
      for (int64_t j = 0; j < cols; ++j) {
        total[j] += static_cast<double>(partial[j]);
        partial[j] = 0.0f;
      }
    }
  }
  float* sqnorm = p.sqnorm + sequence * p.sqnorm_stride + column;
  for (int64_t j = 0; j < cols; ++j) {
    const float sum = sqnorm[j] + static_cast<float>(total[j] + static_cast<double>(partial[j]));
    sqnorm[j] = sum != sum ? float_of_bits(0x7fc00000u) : sum;
  }
}

template <Product product, Dtype dtype>
void product_columns(const ProductSqnormParams& p, int64_t sequence, int64_t begin, int64_t end) {
  const int64_t tiles = (end - begin + kProductTile - 1) / kProductTile;
  for (int64_t tile = 0; tile < tiles; ++tile) {
    const int64_t from = begin + (end - begin) * tile / tiles,
                  to = begin + (end - begin) * (tile + 1) / tiles;
    product_tile<product, dtype>(p, sequence, from, to - from);
  }
}

template <Product product>
void product_typed(const ProductSqnormParams& p, int64_t sequence, int64_t begin, int64_t end) {
  by_dtype(p.dtype,
           [&](auto dtype) { product_columns<product, decltype(dtype)::value>(p, sequence, begin, end); });
}

inline void product_sqnorm_run(const ProductSqnormParams& p, int64_t sequence, int64_t begin, int64_t end) {
  switch (p.product) {
    case Product::kScaleThenWeight:
      return product_typed<Product::kScaleThenWeight>(p, sequence, begin, end);
    case Product::kUnitOffset:
      return product_typed<Product::kUnitOffset>(p, sequence, begin, end);
    case Product::kMultiply:
      return product_typed<Product::kMultiply>(p, sequence, begin, end);
  }
}

}  // namespace
}  // namespace wanda::cpu
