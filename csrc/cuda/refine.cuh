// Refinement of masks by swaps: one block a row.
//
// The reference (wanda_kernels/reference/gram.py) fixes every float64 operation and its rounding, and that
// the lowest column is taken among equals. refine_products.cuh makes what a row begins with: c = G p, its
// error.
//
// Rows: a swap is two passes of the block over the row. The first moves c by one row of G, without keeping
// it, and finds what to prune after u is un-pruned; the second moves c by both rows of G, keeps that, and
// finds what to un-prune next. A thread has the same columns in every pass, so that c, which nobody else
// reads, needs no barrier: a pass has one, for the block's least cost. Costs are compared as integers in the
// order of float64, with the column after them.
//
// Groups: several are looked at at once, a lane for each column that might be un-pruned. The first whose best
// pair is worth it is swapped, c moved, and what comes after it looked at again: the order of one group after
// the other.
//
// State: c, what a column costs by itself, and the weights, in shared memory (18 bytes a column in 16-bit
// types, 20 in float32: an H100 holds three rows of 4,096 columns a processor and one of 11,008; kStaged).
// Wider rows have c alone there (28,672 columns on an H100), or leave it where it was made, and make costs
// anew from weights and the diagonal of G.
//
// Bytes of G for each swap and column: 12, of which 4 were read half a swap before (8, and c twice, would
// take 26 bytes of state: two rows of 4,096 columns a processor, and none of 11,008 in shared memory). Which
// rows of G a row asks for, only its last swap knows: no order of rows brings those that ask for the same
// together, but rows agree on columns with much in common, and L2 keeps what several of them ask for. Of
// 4,096 columns G has 64 MB, of 11,008 485 MB: most comes from memory.
#pragma once

#include <type_traits>

#include "block.cuh"
#include "refine_products.cuh"

namespace wanda::cuda {

constexpr double kLeastGain = 1e-6;
constexpr uint32_t kNoColumn = ~0u;

struct Choice {
  double cost;
  uint32_t column;  // kNoColumn: there is none
};

struct Pair {
  double half;
  uint32_t u, v;  // u = kNoColumn: there is none
};

// Written in turns: one barrier stands between the writes and the reads of one, and the next writes.
struct RefineShared {
  uint64_t keys[2][kWarp];
  uint32_t columns[2][kWarp];
  Pair pairs[2][kWarp];
};
static_assert(sizeof(RefineShared) == kRefineSharedBytes, "plan.h reckons with it");

// float64 in the order of unsigned integers; -0 is +0, and there is no NaN.
WANDA_DEVICE uint64_t ordered(double value) {
  const uint64_t bits = static_cast<uint64_t>(__double_as_longlong(__dadd_rn(value, 0.0)));
  return bits >> 63 ? ~bits : bits | uint64_t{1} << 63;
}
WANDA_DEVICE double from_ordered(uint64_t key) {
  return __longlong_as_double(static_cast<int64_t>(key >> 63 ? key & ~(uint64_t{1} << 63) : ~key));
}

// The warp's least key, and its lowest column, in every lane.
WANDA_DEVICE void warp_least(uint64_t& key, uint32_t& column) {
  const uint32_t high = static_cast<uint32_t>(key >> 32), low = static_cast<uint32_t>(key);
  const uint32_t least_high = __reduce_min_sync(kFullMask, high);
  const uint32_t least_low = __reduce_min_sync(kFullMask, high == least_high ? low : ~0u);
  const bool is_least = high == least_high && low == least_low;
  column = __reduce_min_sync(kFullMask, is_least ? column : kNoColumn);
  key = uint64_t{least_high} << 32 | least_low;
}

struct Move {
  double factor;
  const float* gram;
};

template <Dtype kDtype, int kWidth, bool kStaged>
struct RefinedRow {
  using Bits = typename Element<kDtype>::Bits;
  using Flags = std::conditional_t<kWidth == 2, uint16_t, uint8_t>;  // of the mask, a byte each
  static constexpr int kAhead = kStaged ? 4 : 2;  // loads of a thread that are on their way at once

  const RefineParams& params;
  const RefineBand& band;
  RefineShared& shared;
  int64_t at;  // of the row in mask and weights
  bool* mask;
  const Bits* weights;
  double* c;
  double* own;  // kStaged: what un-pruning a column costs by itself where it is pruned, or pruning it
  double error;
  uint32_t cols;
  int32_t swaps;
  int turn;

  WANDA_DEVICE double weight(uint32_t column) const { return as_double(to_float<kDtype>(weights[column])); }
  WANDA_DEVICE const float* gram(uint32_t column) const { return params.gram + int64_t{column} * cols; }

  WANDA_DEVICE double own_cost(uint32_t column, double w, bool is_pruned) const {
    const double square = __dmul_rn(__dmul_rn(w, w), as_double(__ldg(band.diagonal + column)));
    return __dmul_rn(square, 0.5 * (is_pruned ? 1 - params.damping : 1 + params.damping));
  }
  WANDA_DEVICE double cost_by_itself(uint32_t column, bool is_pruned) const {
    if constexpr (kStaged) return own[column];
    return own_cost(column, weight(column), is_pruned);
  }

  template <class Visit>
  WANDA_DEVICE void for_own_columns(Visit visit) const {
    for (uint32_t first = threadIdx.x * kWidth; first < cols; first += blockDim.x * kWidth) {
#pragma unroll
      for (int e = 0; e < kWidth; ++e) visit(first + e);
    }
  }
  WANDA_DEVICE bool owns(uint32_t column) const { return column / kWidth % blockDim.x == threadIdx.x; }

  WANDA_DEVICE void set(uint32_t column, bool is_pruned) {
    if (!owns(column)) return;
    mask[column] = is_pruned;
    if constexpr (kStaged) own[column] = own_cost(column, weight(column), is_pruned);
  }

  WANDA_DEVICE bool is_good(double half) const { return half < __dmul_rn(-0.5 * kLeastGain, fabs(error)); }

  WANDA_DEVICE void swap(uint32_t u, uint32_t v, double half) {
    set(u, false);
    set(v, true);
    error = __dadd_rn(error, 2 * half);
    ++swaps;
  }

  WANDA_DEVICE Move without(uint32_t column) const { return {-weight(column), gram(column)}; }
  WANDA_DEVICE Move with(uint32_t column) const { return {weight(column), gram(column)}; }

  // The least cost of pruning a column, own + w c, or of un-pruning one, own - w c, after kMoves moves of c.
  // Two are kept.
  template <int kMoves>
  WANDA_DEVICE Choice least(bool prunes, Move first = {}, Move second = {}) {
    Choice best{INFINITY, kNoColumn};
    const double sign = prunes ? 1.0 : -1.0;
    const uint32_t step = blockDim.x * kWidth;
    const float *const first_gram = opaque(first.gram), *const second_gram = opaque(second.gram);
    const bool* const pruned = params.mask + opaque_64(at);
    for (uint32_t begin = threadIdx.x * kWidth; begin < cols; begin += kAhead * step) {
      // All loads first. Past the row's end a thread's first columns are in their place, as nobody may have
      // them.
      float g[kAhead][kWidth], h[kAhead][kWidth];
      Flags flags[kAhead];
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        const bool is_there = begin + i * step < cols;
        const uint32_t column = is_there ? begin + i * step : begin;
        if constexpr (kMoves > 0) load_gram(first_gram + column, g[i]);
        if constexpr (kMoves > 1) load_gram(second_gram + column, h[i]);
        flags[i] = *reinterpret_cast<const Flags*>(pruned + column);
        if (!is_there) flags[i] = prunes ? 0x0101 : 0;
      }
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        const bool is_there = begin + i * step < cols;
        const uint32_t column = is_there ? begin + i * step : begin;
        double x[kWidth], w[kWidth], by_itself[kWidth];
        load(c + column, x);
        if constexpr (kMoves > 0) move(x, first.factor, g[i]);
        if constexpr (kMoves > 1) {
          move(x, second.factor, h[i]);
          if (is_there) store(c + column, x);
        }
        load_weights(column, w);
        if constexpr (kStaged) load(own + column, by_itself);
#pragma unroll
        for (int e = 0; e < kWidth; ++e) {
          const bool is_pruned = (flags[i] >> (8 * e) & 1) != 0;
          if constexpr (!kStaged) by_itself[e] = own_cost(column + e, w[e], is_pruned);
          const double cost = __dadd_rn(by_itself[e], __dmul_rn(sign * w[e], x[e]));
          if (is_pruned != prunes && cost < best.cost) best = {cost, column + e};
        }
      }
    }
    return block_least(best);
  }

  // kWidth neighbours at once.
  template <class T>
  struct alignas(sizeof(T) * kWidth) Neighbours {
    T at[kWidth];
  };
  template <class T>
  WANDA_DEVICE static void load(const T* from, T (&to)[kWidth]) {
    const Neighbours<T> loaded = *reinterpret_cast<const Neighbours<T>*>(from);
#pragma unroll
    for (int e = 0; e < kWidth; ++e) to[e] = loaded.at[e];
  }
  WANDA_DEVICE static void store(double* to, const double (&from)[kWidth]) {
    Neighbours<double> stored;
#pragma unroll
    for (int e = 0; e < kWidth; ++e) stored.at[e] = from[e];
    *reinterpret_cast<Neighbours<double>*>(to) = stored;
  }
  WANDA_DEVICE void load_weights(uint32_t column, double (&to)[kWidth]) const {
    if constexpr (kWidth == 2 && sizeof(Bits) == 2) {
      float low, high;
      unpack<kDtype>(*reinterpret_cast<const uint32_t*>(weights + column), low, high);
      to[0] = as_double(low);
      to[1] = as_double(high);
    } else {
      Bits bits[kWidth];
      load(weights + column, bits);
#pragma unroll
      for (int e = 0; e < kWidth; ++e) to[e] = as_double(to_float<kDtype>(bits[e]));
    }
  }
  WANDA_DEVICE static void load_gram(const float* from, float (&to)[kWidth]) {
    if constexpr (kWidth == 2) {
      const float2 both = __ldg(reinterpret_cast<const float2*>(from));
      to[0] = both.x;
      to[1] = both.y;
    } else {
      to[0] = __ldg(from);
    }
  }
  WANDA_DEVICE static void move(double (&x)[kWidth], double factor, const float (&g)[kWidth]) {
#pragma unroll
    for (int e = 0; e < kWidth; ++e) x[e] = __fma_rn(factor, as_double(g[e]), x[e]);
  }

  WANDA_DEVICE Choice block_least(Choice own_choice) {
    uint64_t key = ordered(own_choice.cost);
    uint32_t column = own_choice.column;
    warp_least(key, column);
    const int lane = lane_of(threadIdx.x), warps = static_cast<int>(blockDim.x) / kWarp;
    turn ^= 1;
    if (lane == 0) {
      shared.keys[turn][threadIdx.x / kWarp] = key;
      shared.columns[turn][threadIdx.x / kWarp] = column;
    }
    __syncthreads();
    key = lane < warps ? shared.keys[turn][lane] : ~uint64_t{0};
    column = lane < warps ? shared.columns[turn][lane] : kNoColumn;
    warp_least(key, column);
    return {from_ordered(key), column};
  }

  WANDA_DEVICE void refine() {
    if (params.most_swaps == 0) return;
    Choice u = least<0>(false);
    while (swaps < params.most_swaps && u.column != kNoColumn) {
      Move first = without(u.column);
      Choice v = least<1>(true, first);
      if (v.column == kNoColumn) return;
      double half = __dadd_rn(u.cost, v.cost);
      Move second = with(v.column);
      if (!is_good(half)) {  // the other way round
        v = least<0>(true);
        if (v.column == kNoColumn) return;
        first = with(v.column);
        u = least<1>(false, first);
        if (u.column == kNoColumn) return;
        half = __dadd_rn(v.cost, u.cost);
        if (!is_good(half)) return;
        second = without(u.column);
      }
      swap(u.column, v.column, half);
      u = least<2>(false, first, second);
    }
  }

  // `lanes` for each group, a power of two. After a swap a warp looks for the next, and after none more of
  // them.
  WANDA_DEVICE void refine_groups(uint32_t lanes) {
    const uint32_t groups = cols / static_cast<uint32_t>(params.m);
    for (int64_t sweep = 0; sweep < params.sweeps; ++sweep) {
      const int32_t before = swaps;
      uint32_t at_once = kWarp / lanes;
      for (uint32_t group = 0; group < groups;) {
        const uint32_t end = min(group + at_once, groups);
        const Pair pair = first_good(group, end, lanes);
        if (pair.u == kNoColumn) {
          group = end;
          at_once = min(2 * at_once, blockDim.x / lanes);
          continue;
        }
        swap(pair.u, pair.v, pair.half);
        move_both(without(pair.u), with(pair.v));
        __syncthreads();
        group = pair.u / static_cast<uint32_t>(params.m) + 1;
        at_once = kWarp / lanes;
      }
      if (swaps == before) return;
    }
  }

  WANDA_DEVICE void move_both(Move first, Move second) {
    const float *const first_gram = opaque(first.gram), *const second_gram = opaque(second.gram);
#pragma unroll 4
    for (uint32_t column = threadIdx.x * kWidth; column < cols; column += blockDim.x * kWidth) {
      float g[kWidth], h[kWidth];
      load_gram(first_gram + column, g);
      load_gram(second_gram + column, h);
      double x[kWidth];
      load(c + column, x);
      move(x, first.factor, g);
      move(x, second.factor, h);
      store(c + column, x);
    }
  }

  // Of groups [group, end), which the block has lanes for, the first whose best pair is good.
  WANDA_DEVICE Pair first_good(uint32_t group, uint32_t end, uint32_t lanes) {
    const uint32_t thread = threadIdx.x, lane = lane_of(thread), warps = blockDim.x / kWarp;
    group += thread / lanes;
    Pair best{INFINITY, kNoColumn, 0};
    if (group < end) best = best_pair(group * static_cast<uint32_t>(params.m), thread % lanes, lanes);
    for (uint32_t step = 1; step < lanes; step *= 2) {
      const Pair other{__shfl_xor_sync(kFullMask, best.half, step), __shfl_xor_sync(kFullMask, best.u, step),
                       __shfl_xor_sync(kFullMask, best.v, step)};
      if (other.half < best.half || (other.half == best.half && other.u < best.u)) best = other;
    }
    const uint32_t good = __ballot_sync(kFullMask, best.u != kNoColumn && is_good(best.half));
    turn ^= 1;
    if (lane == (good == 0 ? 0u : static_cast<uint32_t>(__ffs(good) - 1))) {
      if (good == 0) best.u = kNoColumn;
      shared.pairs[turn][thread / kWarp] = best;
    }
    __syncthreads();
    const uint32_t found = __ballot_sync(kFullMask, lane < warps && shared.pairs[turn][lane].u != kNoColumn);
    return shared.pairs[turn][found == 0 ? 0 : __ffs(found) - 1];
  }

  // Of every `lanes`-th column u of a group from `lane` on: the lowest u among equals, then the lowest v.
  // Nothing waits for the mask: columns that it rules out are reckoned with, and dropped.
  WANDA_DEVICE Pair best_pair(uint32_t begin, uint32_t lane, uint32_t lanes) const {
    const uint32_t end = begin + static_cast<uint32_t>(params.m);
    Pair best{INFINITY, kNoColumn, 0};
    for (uint32_t u = begin + lane; u < end; u += lanes) {
      const double w = weight(u);
      const double gain = __dadd_rn(cost_by_itself(u, true), -__dmul_rn(w, c[u]));
      const bool is_pruned = mask[u];
      const float* const gram_u = gram(u);
#pragma unroll 4
      for (uint32_t v = begin; v < end; ++v) {
        const double after = __fma_rn(-w, as_double(__ldg(gram_u + v)), c[v]);
        const double loss = __dadd_rn(cost_by_itself(v, false), __dmul_rn(weight(v), after));
        const double half = __dadd_rn(gain, loss);
        if (is_pruned && !mask[v] && half < best.half) best = {half, u, v};
      }
    }
    return best;
  }
};

// kGroups: swaps in groups.
template <Dtype kDtype, int kWidth, bool kStaged, bool kGroups>
__global__ void __launch_bounds__(kRefineThreads, 1)
    refine_kernel(const RefineParams params, const RefineBand band, const RefinePlan plan) {
  using Row = RefinedRow<kDtype, kWidth, kStaged>;
  using Bits = typename Row::Bits;
  WANDA_DYNAMIC_SHARED(memory);
  const int64_t row = blockIdx.x, at = (band.first + row) * params.cols;
  double* const made = band.c + row * params.cols;
  const Bits* const weights = static_cast<const Bits*>(params.weight) + at;
  double* const c = kStaged || plan.place == RefinePlace::kShared
                        ? reinterpret_cast<double*>(memory + sizeof(RefineShared))
                        : made;
  Row refined{params,
              band,
              *reinterpret_cast<RefineShared*>(memory),
              at,
              params.mask + at,
              weights,
              c,
              nullptr,
              band.errors[row * band.error_stride],
              static_cast<uint32_t>(params.cols),
              0,
              0};
  if constexpr (kStaged) {
    refined.own = c + params.cols;
    Bits* const staged = reinterpret_cast<Bits*>(refined.own + params.cols);
    refined.for_own_columns([&](uint32_t column) {
      refined.own[column] = refined.own_cost(column, refined.weight(column), refined.mask[column]);
      staged[column] = weights[column];
    });
    refined.weights = staged;
  }
  if (c != made) refined.for_own_columns([&](uint32_t column) { c[column] = made[column]; });
  if constexpr (kGroups) {
    __syncthreads();  // others look at a thread's columns
    refined.refine_groups(plan.lanes);
  } else {
    refined.refine();
  }
  if (c != made && params.sums != nullptr) {
    refined.for_own_columns([&](uint32_t column) { made[column] = c[column]; });
  }
  if (threadIdx.x == 0) params.swaps[band.first + row] = refined.swaps;
}

}  // namespace wanda::cuda
