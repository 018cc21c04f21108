// Row selection: zero (or mark) the k smallest |W| * norm of each row.
//
// Algorithm (bracket select). A score's upper 16 bits are its bucket. A block
//
//   1. scores the row, keeps the buckets in registers, two to a register, and sums them: a mean log2;
//   2. guesses log2 of the k-th smallest as that mean plus a distance learnt from the rows before, and counts
//      the elements below both ends of a bracket of buckets around the guess. A bracket that misses is moved,
//      after three misses by trisection, until it holds rank k: a bad guess costs time, never exactness;
//   3. counts the bracket's elements (1-4 % of a row) in 128 bins, each a bucket or a fraction of one;
//   4. marks the elements of the bins below that with rank k, lists those of the bin itself, a handful, and
//      ranks them by (score, column): the limit;
//   5. marks the listed elements below the limit, and writes.
//
// Rows that this does not fit (a norm that is negative, -0.0, infinite or NaN; a k-th score that is NaN; more
// than kListed elements in one bin) go through rows_any.cuh.
//
// Assumes: a block's rows are of one matrix, blockIdx.y, and so are its norms and what it learns; at most
// 4 * kQuads columns a thread. The staged kernel: 16-byte aligned rows and norms, whole chunks of 16 bytes (a
// mask: 16 columns). The direct kernel: nothing.
//
// One thread: kQuads quads of four elements. Chunk c of a row belongs to thread c mod blockDim.x: a warp
// reads 512 bytes in a row, and a thread's columns ascend with its quads.
//
// Bytes: W in once and out once. The row waits in shared memory (cp.async; no thread reads another's part, so
// that takes no barrier), in two halves of tuning.halves that take turns: as soon as a chunk is written, that
// of a later row is on its way into its place. The norms come from L1 or L2, 4 bytes an element.
//
// Sums of the squared scores: of all where they are computed, of those that go where they are written, from
// what was masked out.
//
// Why buckets, two to a register: four elements are compared with a threshold, and the outcome kept as bits,
// in five instructions (two subtractions, a byte permutation, a shift, a LOP3), 1.25 an element against 2
// with 32-bit scores; and 64 elements fit 32 registers, which spreads barriers and sums over more of them. In
// all 22 SASS instructions an element of 4096 bf16 columns on sm_90 (30 with sums), of 39 that copy speed
// leaves.
//
// Why a mean of logarithms: where 1 % of the channels have 50 times the others' norm, the k-th smallest of a
// row of 11,008 varies by 0.8 % about the guess, against 2.7 % with a mean of scores (Gaussian weights, one
// standard deviation). And it takes one dp2a for two elements.
#pragma once

#include "rows_part.cuh"

namespace wanda::cuda {

constexpr int kListed = 512;

struct RowsShared {
  alignas(16) uint32_t bins[256];
  uint32_t list[kListed];
  uint32_t counts[2][2][kWarp];
  uint32_t sums[2][kWarp];
  float slots[2 * kWarp];
  uint32_t listed;
  // What the rows so far taught: here, as registers are short. Written after a row's last barrier but one,
  // read after the next row's first.
  float distance, rows_learnt;
  bool has_ordinary_norms;
};
static_assert(sizeof(RowsShared) == kRowsSharedBytes, "plan.h reckons with it");

template <Dtype kDtype, int kQuads, Output kOutput, bool kStaged>
struct RowBlock : RowPart<kDtype, kQuads, kOutput, kStaged> {
  using Part = RowPart<kDtype, kQuads, kOutput, kStaged>;
  using Set = typename Part::Set;
  using Part::chunk_column, Part::holds, Part::column_of, Part::load_chunk, Part::load_norms,
      Part::start_phase;
  using Part::kChunks, Part::kQuadsPerChunk;
  using Part::params, Part::staged, Part::row;

  const RowsTuning& tuning;
  RowsShared& shared;
  uint32_t keys[2 * kQuads];
  float all;  // the sum of this thread's squared scores

  // Of the element that is bit `bit` of a set's word `i`.
  WANDA_DEVICE uint32_t key_at(uint32_t column, int i, int bit) const {
    const bool is_first = Part::half_of(Part::quad_of(i, bit) / kQuadsPerChunk) == 0;
    const typename Part::Bits* const from = !kStaged ? row : is_first ? staged[0] : staged[1];
    return __float_as_uint(score_of<kDtype>(from[column], __ldg(norm_at(params, column))));
  }

  // This thread's elements of `set`, one by one: visit(column, word, bit).
  template <class Visit>
  WANDA_DEVICE void for_each(const Set& set, Visit visit) const {
#pragma unroll
    for (int i = 0; i < Set::kWords; ++i) {
      for (uint32_t rest = set.word[i]; rest != 0; rest &= rest - 1) {
        const int bit = __ffs(rest) - 1;
        visit(column_of(i, bit), i, bit);
      }
    }
  }

  // Step 1: fills `keys` and `all`, returns the sum of this thread's buckets.
  WANDA_DEVICE uint32_t score_row() {
    start_phase();
    uint32_t sum = 0;
    all = 0;
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      const uint32_t column = chunk_column(c);
      const uint4 chunk = load_chunk(c, column);
#pragma unroll
      for (int q = 0; q < kQuadsPerChunk; ++q) {
        float score[4];
        quad_scores<kDtype>(chunk, q, load_norms(column, q), score);
        if constexpr (kOutput == Output::kPruneAndSum) {
#pragma unroll
          for (int e = 0; e < 4; ++e) all = __fmaf_rn(score[e], score[e], all);
        }
        const int quad = c * kQuadsPerChunk + q;
        keys[2 * quad] = permute_bytes<0x7632>(__float_as_uint(score[0]), __float_as_uint(score[1]));
        keys[2 * quad + 1] = permute_bytes<0x7632>(__float_as_uint(score[2]), __float_as_uint(score[3]));
        sum = __dp2a_lo(keys[2 * quad], 0x0101u, sum);  // both halves times 1
        sum = __dp2a_lo(keys[2 * quad + 1], 0x0101u, sum);
      }
    }
    return sum;
  }

  // The elements in buckets below `bucket`, at most kTopBucket. A half of 0x8000 + bucket - 1 minus a key
  // keeps its top bit exactly where key < bucket, and never borrows from its neighbour.
  WANDA_DEVICE Set below(uint32_t bucket) const {
    const uint32_t minuend = (0x7fffu + bucket) * 0x10001u;
    Set set;
#pragma unroll
    for (int i = 0; i < Set::kWords; ++i) {
      uint32_t word = 0;
#pragma unroll
      for (int q = i * 8; q < i * 8 + Set::quads(i); ++q) {
        const uint32_t four = permute_bytes<0x7531>(minuend - keys[2 * q], minuend - keys[2 * q + 1]);
        word = (word >> 1) | (four & 0x80808080u);
      }
      set.word[i] = word;
    }
    return set;
  }

  // What lies past the row's end has score 0, in bucket 0 and in no other: where bucket 0 is looked into, it
  // goes.
  WANDA_DEVICE void drop_padding(Set& set) const {
#pragma unroll
    for (int i = 0; i < Set::kWords; ++i) {
#pragma unroll 1
      for (int bit = 0; bit < 32; ++bit) {
        if (!holds(column_of(i, bit))) set.word[i] &= ~(1u << bit);
      }
    }
  }
  WANDA_DEVICE uint32_t padding() const {
    return blockDim.x * 4 * kQuads - static_cast<uint32_t>(params.cols);
  }

  // Step 2: a bracket of at most kBins buckets that holds rank k, and this thread's elements below and in it.
  WANDA_DEVICE Bracket find_bracket(float guess, float half_width, Set& under_low, Set& inside) {
    const int warp = threadIdx.x / kWarp, lane = lane_of(threadIdx.x);
    BracketSearch search;
    search.rank = static_cast<uint32_t>(params.k);
    search.set_around(guess, guess * half_width);
    for (int attempt = 0; search.least < kTopBucket; ++attempt) {
      search.clamp();
      under_low = below(search.low);
      inside = below(search.high).without(under_low);
      if (search.low == 0) drop_padding(inside);
      const uint32_t warp_low = __reduce_add_sync(kFullMask, under_low.count());
      const uint32_t warp_inside = __reduce_add_sync(kFullMask, inside.count());
      uint32_t (*slots)[kWarp] = shared.counts[attempt & 1];  // the other half may still be read
      if (lane == 0) {
        slots[0][warp] = warp_low;
        slots[1][warp] = warp_inside;
      }
      __syncthreads();
      const bool is_warp = lane < static_cast<int>(blockDim.x) / kWarp;
      uint32_t count_low = __reduce_add_sync(kFullMask, is_warp ? slots[0][lane] : 0);
      const uint32_t count_inside = __reduce_add_sync(kFullMask, is_warp ? slots[1][lane] : 0);
      if (search.low != 0) count_low -= padding();
      const uint32_t width = search.high - search.low;
      // A sixteenth of the row and more is worth another pass, unless equal scores may be why.
      const bool is_crowded =
          count_inside > static_cast<uint32_t>(params.cols) / 16 && width > 2 && attempt < 3;
      if (search.rank - count_low < count_inside && width <= kBins && !is_crowded) {
        return {search.low, search.high, count_low, true};
      }
      search.move(count_low, count_inside, attempt, tuning.half_width);
    }
    return {0, 0, 0, false};
  }

  // Steps 3 to 5 up to the writing: adds to `pruned`, the elements below the bracket, those in it that go.
  // False: this row needs rows_any.cuh.
  WANDA_DEVICE bool select(const Bracket& bracket, const Set& inside, Set& pruned, float& kth) {
    start_phase();
    const uint32_t rank = static_cast<uint32_t>(params.k) - bracket.below;
    const uint32_t first_key = bracket.low << kBucketBits;
    const uint32_t bin_shift = fine_shift(bracket);
    for_each(inside, [&](uint32_t column, int i, int bit) {
      atomicAdd(&shared.bins[(key_at(column, i, bit) - first_key) >> bin_shift], 1u);
    });
    __syncthreads();
    const Bin bin = find_bin<kBins / kWarp>(shared.bins, rank);
    const uint32_t bin_key = first_key + (bin.index << bin_shift);
    if (bin.size > kListed) return false;

    Set open;  // in the bin itself: the limit decides
#pragma unroll
    for (int i = 0; i < Set::kWords; ++i) open.word[i] = 0;
    for_each(inside, [&](uint32_t column, int i, int bit) {
      const uint32_t key = key_at(column, i, bit);
      if (key < bin_key) {
        pruned.word[i] |= 1u << bit;
      } else if ((key - bin_key) >> bin_shift == 0) {
        open.word[i] |= 1u << bit;
        shared.list[atomicAdd(&shared.listed, 1u)] = key << 16 | column;
      }
    });
    __syncthreads();
    const uint32_t limit = rank_listed(bin.size, rank - bin.below);
    for_each(open, [&](uint32_t column, int i, int bit) {
      if ((key_at(column, i, bit) << 16 | column) < limit) pruned.word[i] |= 1u << bit;
    });
    kth = __uint_as_float((bin_key >> kBucketBits) << kBucketBits | limit >> 16);
    return true;
  }

  // The entry of rank `rank` of the list's first `size`.
  WANDA_DEVICE uint32_t rank_listed(uint32_t size, uint32_t rank) {
    if (size > kWarp) {
      return static_cast<uint32_t>(
          radix_select([&](int64_t i) { return uint64_t{shared.list[i]}; }, size, rank, 24, shared.bins));
    }
    const uint32_t lane = lane_of(threadIdx.x);
    const uint32_t own = lane < size ? shared.list[lane] : 0xffffffffu;
    uint32_t smaller = 0;
#pragma unroll 1
    for (uint32_t i = 0; i < size; ++i) smaller += __shfl_sync(kFullMask, own, i) < own;
    const uint32_t owner = __ballot_sync(kFullMask, lane < size && smaller == rank);
    return __shfl_sync(kFullMask, own, __ffs(owner) - 1);
  }
};

template <Dtype kDtype, int kQuads, Output kOutput, bool kStaged>
__global__ void __launch_bounds__(rows_threads(kQuads))
    rows_kernel(const RowsParams params, const RowsTuning tuning) {
  using Block = RowBlock<kDtype, kQuads, kOutput, kStaged>;
  using Bits = typename Block::Bits;
  WANDA_DYNAMIC_SHARED(memory);
  RowsShared& shared = *reinterpret_cast<RowsShared*>(memory);
  Bits* const buffers = reinterpret_cast<Bits*>(memory + sizeof(RowsShared));
  Block block{{params, threadIdx.x, nullptr, buffers, tuning.halves, {}, {}, {}}, tuning, shared, {}, 0};
  if constexpr (kStaged) block.fill();
  const uint32_t odd_norms = block_sum(block.has_ordinary_norms() ? 0u : 1u, shared.sums[1]);
  if (threadIdx.x == 0) {
    shared.distance = tuning.distance;
    shared.rows_learnt = 0;
    shared.has_ordinary_norms = odd_norms == 0;
  }
  int buffer = 0;  // of the row's first half
  for (int step = 0;; ++step) {
    const int64_t row_of_matrix = blockIdx.x + int64_t{gridDim.x} * step;
    if (row_of_matrix >= params.norm_rows) break;
    const int64_t row = first_row_of(params) + row_of_matrix;
    block.row = static_cast<Bits*>(params.weight) + row * params.row_stride;
    if constexpr (kStaged) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        block.read_from(half, buffer);
        buffer = buffer + 1 == tuning.halves ? 0 : buffer + 1;
      }
      // Each half is a group of copies: those behind the row's two may still be on their way.
      if (tuning.halves == 4) {
        copy_async_wait<2>();
      } else if (tuning.halves == 3) {
        copy_async_wait<1>();
      } else {
        copy_async_wait<0>();
      }
    }
    // A bucket is 128 * (log2 of its scores + 127), but for a logarithm that runs straight between powers of
    // two.
    const float buckets = static_cast<float>(block_sum(block.score_row(), shared.sums[0]));
    const float mean_log = buckets * tuning.inverse_cols / 128.0f - 127.0f;
    // Between the barriers of the sum and of the bracket: nobody reads the last row's bins and list any more.
    for (int i = threadIdx.x; i < kBins; i += blockDim.x) shared.bins[i] = 0;
    if (threadIdx.x == 0) shared.listed = 0;

    typename Block::Set inside, pruned;
    float kth = 0;
    Bracket bracket{0, 0, 0, false};
    if (shared.has_ordinary_norms) {
      const float half_width = shared.rows_learnt == 0 ? tuning.first_half_width : tuning.half_width;
      bracket = block.find_bracket(exp2f(mean_log + shared.distance), half_width, pruned, inside);
    }
    const bool is_selected = bracket.found && block.select(bracket, inside, pruned, kth);
    const auto make_way = [&] {
#pragma unroll
      for (int half = 0; half < 2; ++half) block.refill_from(half, 2 * step + half + tuning.halves);
    };
    ScoreSums sums[1] = {{0, block.all}};
    if (is_selected) {
      if (threadIdx.x == 0 && kth > 0 && kth <= 3e38f) {  // an infinite one teaches nothing
        shared.rows_learnt = fminf(shared.rows_learnt + 1, 8.0f);
        shared.distance += __fdividef(__log2f(kth) - mean_log - shared.distance, shared.rows_learnt);
      }
      make_way();
      sums[0].pruned = block.write_row(row, pruned);
    } else {
      __syncthreads();  // bins and slots are still being read
      const Segment<kDtype> segment{block.row, norm_at(params, 0),
                                    kOutput == Output::kMask ? params.mask + row * params.cols : nullptr,
                                    params.cols, params.k};
      sums[0] = select_segment<kDtype>(segment, shared.bins);
      make_way();
      block.refill_all();
    }
    if constexpr (kOutput == Output::kPruneAndSum)
      write_sums(sums, 1, params.score_sums + 2 * row, shared.slots);
  }
}

}  // namespace wanda::cuda
