// Column sums of squares. Included by isa_<set>.cpp; one thread, one sequence.
//
// A segment is a sequence too: of its own length, one behind the other in x.
//
// A tile of columns stays in L1 and L2 while the tokens stream by, eight rows a pass: load the float32
// partials, add the eight squares in token order, store. The same columns of the next eight rows are
// prefetched to L2 meanwhile: the hardware follows eight streams badly (1.05-1.3 x a plain read without,
// 0.75-1.0 x with, tiles of 4096 columns and wider better than narrow ones). After kChunk counted tokens the
// partials go to float64 totals. Tokens that the mask leaves out are never read, and chunks count only the
// others: a padded sequence gives the bits of the sequence without its padding. Columns never mix, and
// multiplication and addition stay apart (-ffp-contract=off), so the bits do not depend on the instruction
// set or on the split of the columns. NaN is stored as 0x7fc00000: which payload survives an addition depends
// on the order of the operands, which compilers may swap. Bytes moved: x is read once.
#pragma once

#include "isa.h"
#include "scalar.h"

namespace wanda::cpu {
namespace {

constexpr int64_t kChunk = 4096;      // tokens, see isa.h
constexpr int64_t kSqnormBatch = 64;  // rows listed at a time
static_assert(kChunk % kSqnormBatch == 0, "a chunk ends with a batch");
constexpr int64_t kSqnormPass = 8;     // rows
constexpr int64_t kSqnormTile = 8192;  // columns

template <class Vector>
constexpr int64_t kSqnormUnit = Vector::kLanes == 1 ? 1 : 2 * Vector::kLanes;  // columns

// Adds rows[0] .. rows[count - 1], from column `column` on; column j of the sums is place_in_pair(j) of
// `partial`. rows[count] .. rows[2 * count - 1] come next.
template <class Vector, Dtype dtype, int count>
void sqnorm_add(const typename Element<dtype>::Bits* const* rows, int64_t column, int64_t cols,
                float* partial) {
  if constexpr (Vector::kLanes == 1) {
    for (int64_t j = 0; j < cols; ++j) {
      float sum = partial[j];
      for (int r = 0; r < count; ++r) {
        const float value = to_float<dtype>(rows[r][column + j]);
        sum += value * value;
      }
      partial[j] = sum;
    }
  } else {
    for (int64_t j = 0; j < cols; j += kSqnormUnit<Vector>) {
      auto a = Vector::load(partial + j), b = Vector::load(partial + j + Vector::kLanes);
      for (int r = 0; r < count; ++r) {
        prefetch_l2(rows[r + count] + column + j);
        const auto value = Vector::template load_pair<dtype>(rows[r] + column + j);
        a = Vector::add(a, Vector::multiply(value.a, value.a));
        b = Vector::add(b, Vector::multiply(value.b, value.b));
      }
      Vector::store(partial + j, a);
      Vector::store(partial + j + Vector::kLanes, b);
    }
  }
}

// Tokens [begin, end) of x, of which the mask has a say. `cols` is a multiple of kSqnormUnit and at most
// kSqnormTile.
template <class Vector, Dtype dtype>
void sqnorm_tile(const typename Element<dtype>::Bits* x, const bool* token_mask, const SqnormParams& p,
                 int64_t begin, int64_t end, int64_t column, int64_t cols, float* sqnorm) {
  alignas(64) float partial[kSqnormTile];
  alignas(64) double total[kSqnormTile];
  const bool is_short = end - begin < kChunk;  // needs no total, which takes as long to set as its sums
  for (int64_t j = 0; j < cols; ++j) partial[j] = 0.0f;
  for (int64_t j = 0; j < cols && !is_short; ++j) total[j] = 0.0;
  // The rows of this batch and of the pass after it, for the prefetch.
  const typename Element<dtype>::Bits* rows[kSqnormBatch + kSqnormPass];
  int64_t found = 0;
  int64_t token = begin;
  int64_t in_chunk = 0;
  while (true) {
    for (; token < end && found < kSqnormBatch + kSqnormPass; ++token) {
      rows[found] = x + token * p.token_stride;
      found += token_mask == nullptr || token_mask[token];
    }
    if (found == 0) break;
    for (int64_t r = found, next = end; r < kSqnormBatch + kSqnormPass; ++r) {  // of the segment behind this
      next = next < p.tokens ? next : p.tokens - 1;
      rows[r] = x + next++ * p.token_stride;
    }
    const int64_t counted = found < kSqnormBatch ? found : kSqnormBatch;
    int64_t r = 0;
    for (; r + kSqnormPass <= counted; r += kSqnormPass) {
      sqnorm_add<Vector, dtype, kSqnormPass>(rows + r, column, cols, partial);
    }
    const int64_t left = counted - r;
    if ((left & 4) != 0) sqnorm_add<Vector, dtype, 4>(rows + r, column, cols, partial);
    if ((left & 2) != 0) sqnorm_add<Vector, dtype, 2>(rows + r + (left & 4), column, cols, partial);
    if ((left & 1) != 0) sqnorm_add<Vector, dtype, 1>(rows + counted - 1, column, cols, partial);
    in_chunk += counted;
    if (in_chunk == kChunk) {
      in_chunk = 0;
      for (int64_t j = 0; j < cols; ++j) {
        total[j] += static_cast<double>(partial[j]);
        partial[j] = 0.0f;
      }
    }
    found -= counted;
    for (int64_t i = 0; i < found; ++i) rows[i] = rows[kSqnormBatch + i];
  }
  // Column j, whose sums are at `at`.
  const auto add = [&](int64_t j, int64_t at) {
    const float own =
        is_short ? partial[at] : static_cast<float>(total[at] + static_cast<double>(partial[at]));
    const float sum = sqnorm[column + j] + own;
    sqnorm[column + j] = sum != sum ? float_of_bits(0x7fc00000u) : sum;
  };
  constexpr int64_t kPair = 2 * Vector::kLanes;
  if (place_in_pair<Vector, dtype>(1) == 1) {
    for (int64_t j = 0; j < cols; ++j) add(j, j);
  } else {
    for (int64_t pair = 0; pair < cols; pair += kPair) {
      for (int64_t i = 0; i < kPair / 2; ++i) {
        add(pair + 2 * i, pair + i);
        add(pair + 2 * i + 1, pair + kPair / 2 + i);
      }
    }
  }
}

template <class Vector, Dtype dtype>
void sqnorm_columns(const SqnormParams& p, int64_t sequence, int64_t begin, int64_t end) {
  const auto* x = static_cast<const typename Element<dtype>::Bits*>(p.x) + sequence * p.sequence_stride;
  const bool* token_mask = p.token_mask == nullptr ? nullptr : p.token_mask + sequence * p.tokens;
  float* sqnorm = p.sqnorm + (p.is_shared ? 0 : sequence * p.cols);
  const int64_t first = p.ends != nullptr && sequence > 0 ? p.ends[sequence - 1] : 0;
  const int64_t last = p.ends != nullptr ? p.ends[sequence] : p.tokens;
  int64_t column = begin;
  while (end - column >= kSqnormUnit<Vector>) {
    const int64_t whole = (end - column) / kSqnormUnit<Vector> * kSqnormUnit<Vector>;
    const int64_t cols = whole < kSqnormTile ? whole : kSqnormTile;
    sqnorm_tile<Vector, dtype>(x, token_mask, p, first, last, column, cols, sqnorm);
    column += cols;
  }
  if (column < end) {
    sqnorm_tile<Scalar, dtype>(x, token_mask, p, first, last, column, end - column, sqnorm);
  }
}

template <class Vector>
void sqnorm_run(const SqnormParams& p, int64_t sequence, int64_t begin, int64_t end) {
  const HonourDenormals honour_denormals;
  by_dtype(p.dtype,
           [&](auto dtype) { sqnorm_columns<Vector, decltype(dtype)::value>(p, sequence, begin, end); });
}

}  // namespace
}  // namespace wanda::cpu
