// Refinement of masks by swaps. Included by isa_<set>.cpp; one thread, some rows.
//
// The reference (wanda_kernels/reference) gives every float64 operation, rounded on its own, and this file
// does the same ones: products of two float32 are exact in float64, so that a fused multiply-add changes no
// bit of c = G p, and what the lanes of a register do separately is separate in the reference. The least cost
// is that of the lowest column among equals, whatever the width of a register.
//
// c of kRefineRows rows at once: blocks of G's rows and columns are copied into a panel of float64, and a
// block of sums stays in registers while G's rows pass by in order. Then row by row. A row's state, c twice
// (as it is, and with half of a swap made), what un-pruning and pruning cost by themselves (infinity where a
// column cannot), and the weights, takes 36 bytes a column: more than L1 at 1,024 columns, in L2 up to
// 28,672. A swap is two passes, each of which adds a row of G to c and finds the least cost of what comes
// next. Bytes moved: G once for every kRefineRows rows, and two rows of it for each swap.
#pragma once

#include "isa.h"
#include "scalar.h"

namespace wanda::cpu {
namespace {

constexpr int64_t kRefineRows = 96;     // a multiple of every kDown
constexpr int64_t kRefineDepth = 256;   // rows of G
constexpr int64_t kRefineAhead = 1024;  // columns: a page, at which the hardware stops; swaps 1.25 x as fast
constexpr double kLeastGain = 1e-6;
constexpr double kNone = __builtin_inf();

#if !defined(__clang__)  // GCC looks at functions of the widths, too, that nobody calls here.
#pragma GCC diagnostic ignored "-Wpsabi"
#endif

// Registers of float64 in GCC's and Clang's vector extension: one code for all instruction sets. GCC 12
// converts no vectors whose size is a template's argument.
template <int kBytes>
struct Registers;
#define WANDA_REGISTERS(bytes)                                                                           \
  template <>                                                                                            \
  struct Registers<bytes> {                                                                              \
    typedef double Doubles __attribute__((vector_size(bytes)));                                          \
    typedef int64_t Longs __attribute__((vector_size(bytes)));                                           \
    typedef double DoublesAnywhere __attribute__((vector_size(bytes), aligned(8), may_alias));           \
    typedef float FloatsAnywhere __attribute__((vector_size(bytes / 2), aligned(4), may_alias));         \
    WANDA_STEP static Doubles load(const double* from) {                                                 \
      return *reinterpret_cast<const DoublesAnywhere*>(from);                                            \
    }                                                                                                    \
    WANDA_STEP static Doubles load(const float* from) {                                                  \
      return __builtin_convertvector(*reinterpret_cast<const FloatsAnywhere*>(from), Doubles);           \
    }                                                                                                    \
    WANDA_STEP static void store(double* to, Doubles x) { *reinterpret_cast<DoublesAnywhere*>(to) = x; } \
  }
WANDA_REGISTERS(16);
WANDA_REGISTERS(32);
WANDA_REGISTERS(64);
#undef WANDA_REGISTERS

template <class Vector>
struct Wide : Registers<Vector::kBytes> {
  static constexpr int kLanes = Vector::kBytes / 8;
  // Of the block of sums that stays in registers: 24 of AVX-512's 32, 8 of the others' 16.
  static constexpr int kAcross = kLanes == 8 ? 4 : 2, kDown = kLanes == 8 ? 6 : 4;
  static constexpr int64_t kPanel = kAcross * kLanes;  // columns
};

constexpr int64_t kWidestPanel = 32;

inline int64_t padded(int64_t cols) { return (cols + kWidestPanel - 1) / kWidestPanel * kWidestPanel; }

// What a thread works with.
class RefineBuffer {
 public:
  explicit RefineBuffer(int64_t cols)
      : memory_(new double[static_cast<size_t>((kRefineRows + 3) * padded(cols) +
                                               (kRefineRows + kWidestPanel) * kRefineDepth)]),
        c(memory_),
        moved(c + kRefineRows * padded(cols)),
        unpruning(moved + padded(cols)),
        pruning(unpruning + padded(cols)),
        pruned(pruning + padded(cols)),
        panel(pruned + kRefineRows * kRefineDepth),
        weight(new float[static_cast<size_t>(padded(cols))]) {}
  ~RefineBuffer() {
    delete[] memory_;
    delete[] weight;
  }
  RefineBuffer(const RefineBuffer&) = delete;
  RefineBuffer& operator=(const RefineBuffer&) = delete;

 private:
  double* const memory_;

 public:
  double* const c;          // [kRefineRows, padded(cols)]
  double* const moved;      // [cols]: a row's c with half of a swap made
  double* const unpruning;  // [cols]
  double* const pruning;    // [cols]
  double* const pruned;     // [kRefineRows, kRefineDepth]: weights, 0 where they are kept
  double* const panel;      // [kRefineDepth, kPanel] of G
  float* const weight;      // [cols]
};

template <Dtype dtype>
float weight_at(const RefineParams& p, int64_t row, int64_t column) {
  return to_float<dtype>(static_cast<const typename Element<dtype>::Bits*>(p.weight)[row * p.cols + column]);
}

// c[0 .. kDown) of one panel's columns: `depth` rows of G more, in order.
template <class Vector>
WANDA_PASS void add_products(double* c, int64_t stride, const double* pruned, const double* panel,
                             int64_t depth) {
  using W = Wide<Vector>;
  typename W::Doubles sums[W::kDown][W::kAcross];
  for (int r = 0; r < W::kDown; ++r) {
    for (int i = 0; i < W::kAcross; ++i) sums[r][i] = W::load(c + r * stride + i * W::kLanes);
  }
  for (int64_t k = 0; k < depth; ++k) {
    typename W::Doubles g[W::kAcross];
    for (int i = 0; i < W::kAcross; ++i) g[i] = W::load(panel + k * W::kPanel + i * W::kLanes);
    for (int r = 0; r < W::kDown; ++r) {
      const double w = pruned[r * kRefineDepth + k];
      for (int i = 0; i < W::kAcross; ++i) {
        if constexpr (Vector::kLanes > 1) {  // the same bits, 1.15 x as fast
          sums[r][i] = Vector::multiply_add(typename W::Doubles{} + w, g[i], sums[r][i]);
        } else {
          sums[r][i] += w * g[i];
        }
      }
    }
  }
  for (int r = 0; r < W::kDown; ++r) {
    for (int i = 0; i < W::kAcross; ++i) W::store(c + r * stride + i * W::kLanes, sums[r][i]);
  }
}

// c of rows [begin, begin + count).
template <class Vector, Dtype dtype>
WANDA_PASS void gram_products(const RefineParams& p, int64_t begin, int64_t count, RefineBuffer& buffer) {
  using W = Wide<Vector>;
  const int64_t stride = padded(p.cols), rows = (count + W::kDown - 1) / W::kDown * W::kDown;
  for (int64_t i = 0; i < rows * stride; ++i) buffer.c[i] = 0;
  for (int64_t first = 0; first < p.cols; first += kRefineDepth) {
    const int64_t depth = p.cols - first < kRefineDepth ? p.cols - first : kRefineDepth;
    for (int64_t r = 0; r < rows; ++r) {
      const bool* mask = p.mask + (begin + r) * p.cols;
      for (int64_t k = 0; k < depth; ++k) {
        const bool is_pruned = r < count && mask[first + k];
        buffer.pruned[r * kRefineDepth + k] = is_pruned ? weight_at<dtype>(p, begin + r, first + k) : 0.0f;
      }
    }
    for (int64_t column = 0; column < p.cols; column += W::kPanel) {
      const int64_t wide = p.cols - column < W::kPanel ? p.cols - column : W::kPanel;
      for (int64_t k = 0; k < depth; ++k) {
        const float* gram = p.gram + (first + k) * p.cols + column;
        double* panel = buffer.panel + k * W::kPanel;
        if (wide == W::kPanel) {
          for (int i = 0; i < W::kAcross; ++i) W::store(panel + i * W::kLanes, W::load(gram + i * W::kLanes));
        } else {
          for (int64_t i = 0; i < W::kPanel; ++i) panel[i] = i < wide ? gram[i] : 0.0f;
        }
      }
      for (int64_t r = 0; r < rows; r += W::kDown) {
        add_products<Vector>(buffer.c + r * stride + column, stride, buffer.pruned + r * kRefineDepth,
                             buffer.panel, depth);
      }
    }
  }
}

struct Choice {
  double cost;
  int64_t column;  // -1: there is none
};

// The least cost of un-pruning a column, own - w c, or of pruning one, own + w c. With `kMoves` after c was
// moved by `factor` times a row of G, which is stored in `moved`.
template <class Vector, bool kPrunes, bool kMoves>
WANDA_PASS Choice least(const double* c, double factor, const float* gram, double* moved, const double* own,
                        const float* weight, int64_t cols) {
  using W = Wide<Vector>;
  using Doubles = typename W::Doubles;
  using Longs = typename W::Longs;
  constexpr int kWays = 2;  // a register's minimum waits for the one before
  constexpr int64_t kStep = kWays * W::kLanes;
  const Doubles zero = {};
  Doubles best[kWays];
  Longs at[kWays];  // the step
  for (int way = 0; way < kWays; ++way) {
    best[way] = zero + kNone;
    at[way] = Longs{} - 1;
  }
  int64_t j = 0;
  for (; j + kStep <= cols; j += kStep) {
    for (int way = 0; way < kWays; ++way) {
      const int64_t i = j + way * W::kLanes;
      Doubles x = W::load(c + i);
      if constexpr (kMoves) {
#if defined(__x86_64__)
        prefetch_l2(gram + i + kRefineAhead);
#endif
        x += factor * W::load(gram + i);
        W::store(moved + i, x);
      }
      const Doubles by_c = W::load(weight + i) * x;
      const Doubles cost = kPrunes ? W::load(own + i) + by_c : W::load(own + i) - by_c;
      const Longs is_less = cost < best[way];
      best[way] = is_less ? cost : best[way];
      at[way] = is_less ? Longs{} + j : at[way];
    }
  }
  Choice choice{kNone, -1};
  for (int way = 0; way < kWays; ++way) {
    for (int lane = 0; lane < W::kLanes; ++lane) {
      const int64_t column = at[way][lane] + way * W::kLanes + lane;
      if (best[way][lane] < choice.cost || (best[way][lane] == choice.cost && column < choice.column)) {
        choice = {best[way][lane], column};
      }
    }
  }
  for (; j < cols; ++j) {
    double x = c[j];
    if constexpr (kMoves) {
      x += factor * static_cast<double>(gram[j]);
      moved[j] = x;
    }
    const double by_c = static_cast<double>(weight[j]) * x;
    const double cost = kPrunes ? own[j] + by_c : own[j] - by_c;
    if (cost < choice.cost) choice = {cost, j};
  }
  return choice;
}

// A row on its way.
template <class Vector>
struct RefinedRow {
  const RefineParams& p;
  RefineBuffer& buffer;
  bool* mask;
  double* c;
  double error = 0;
  int32_t swaps = 0;

  double weight(int64_t column) const { return buffer.weight[column]; }
  const float* gram(int64_t column) const { return p.gram + column * p.cols; }
  double square(int64_t column) const {
    return weight(column) * weight(column) * static_cast<double>(gram(column)[column]);
  }

  double pruned_error() const {
    double sum = 0;
    for (int64_t j = 0; j < p.cols; ++j) sum += mask[j] ? weight(j) * c[j] + p.damping * square(j) : 0.0;
    return sum;
  }

  void set(int64_t column, bool is_pruned) {
    const double square_here = square(column);
    mask[column] = is_pruned;
    buffer.unpruning[column] = is_pruned ? square_here * (0.5 * (1 - p.damping)) : kNone;
    buffer.pruning[column] = is_pruned ? kNone : square_here * (0.5 * (1 + p.damping));
  }

  bool is_good(double half) const { return half < -0.5 * kLeastGain * (error < 0 ? -error : error); }

  void swap(int64_t u, int64_t v, double half) {
    set(u, false);
    set(v, true);
    error += 2 * half;
    ++swaps;
  }

  Choice unprune() const {
    return least<Vector, false, false>(c, 0, nullptr, nullptr, buffer.unpruning, buffer.weight, p.cols);
  }
  Choice prune() const {
    return least<Vector, true, false>(c, 0, nullptr, nullptr, buffer.pruning, buffer.weight, p.cols);
  }
  // After `from` was moved to `to` by a row of G.
  Choice unprune(const double* from, int64_t pruned, double* to) const {
    return least<Vector, false, true>(from, weight(pruned), gram(pruned), to, buffer.unpruning, buffer.weight,
                                      p.cols);
  }
  Choice prune(const double* from, int64_t unpruned, double* to) const {
    return least<Vector, true, true>(from, -weight(unpruned), gram(unpruned), to, buffer.pruning,
                                     buffer.weight, p.cols);
  }
  // As prune(from, unpruned, to), of which only the move is wanted, and then what to un-prune.
  Choice unprune_without(const double* from, int64_t unpruned, double* to) const {
    return least<Vector, false, true>(from, -weight(unpruned), gram(unpruned), to, buffer.unpruning,
                                      buffer.weight, p.cols);
  }

  void refine() {
    if (p.most_swaps == 0) return;
    Choice u = unprune();
    while (swaps < p.most_swaps && u.column >= 0) {
      Choice v = prune(c, u.column, buffer.moved);
      if (v.column < 0) return;
      if (is_good(u.cost + v.cost)) {
        swap(u.column, v.column, u.cost + v.cost);
        u = unprune(buffer.moved, v.column, c);
        continue;
      }
      v = prune();
      if (v.column < 0) return;
      u = unprune(c, v.column, buffer.moved);
      if (u.column < 0 || !is_good(v.cost + u.cost)) return;
      swap(u.column, v.column, v.cost + u.cost);
      u = unprune_without(buffer.moved, u.column, c);
    }
  }

  // The best pair of each group, `sweeps` times.
  void refine_groups() {
    for (int64_t sweep = 0; sweep < p.sweeps; ++sweep) {
      const int32_t before = swaps;
      for (int64_t begin = 0; begin < p.cols; begin += p.m) refine_group(begin);
      if (swaps == before) return;
    }
  }

  void refine_group(int64_t begin) {
    double best = kNone;
    int64_t best_u = 0, best_v = 0;
    for (int64_t u = begin; u < begin + p.m; ++u) {
      if (!mask[u]) continue;
      const double gain = buffer.unpruning[u] - weight(u) * c[u];
      const float* gram_u = gram(u);
      for (int64_t v = begin; v < begin + p.m; ++v) {
        const double after = c[v] - weight(u) * static_cast<double>(gram_u[v]);
        const double half = gain + (buffer.pruning[v] + weight(v) * after);
        if (half < best) {
          best = half;
          best_u = u;
          best_v = v;
        }
      }
    }
    if (!is_good(best)) return;
    move(best_u, best_v);
    swap(best_u, best_v, best);
  }

  WANDA_PASS void move(int64_t u, int64_t v) {
    const double w_u = weight(u), w_v = weight(v);
    const float *gram_u = gram(u), *gram_v = gram(v);
    for (int64_t j = 0; j < p.cols; ++j) {
      c[j] = (c[j] - w_u * static_cast<double>(gram_u[j])) + w_v * static_cast<double>(gram_v[j]);
    }
  }
};

template <class Vector, Dtype dtype>
void refine_rows(const RefineParams& p, int64_t begin, int64_t end) {
  RefineBuffer buffer(p.cols);
  for (int64_t first = begin; first < end; first += kRefineRows) {
    const int64_t count = end - first < kRefineRows ? end - first : kRefineRows;
    gram_products<Vector, dtype>(p, first, count, buffer);
    for (int64_t row = first; row < first + count; ++row) {
      RefinedRow<Vector> refined{p, buffer, p.mask + row * p.cols, buffer.c + (row - first) * padded(p.cols)};
      for (int64_t j = 0; j < p.cols; ++j) buffer.weight[j] = weight_at<dtype>(p, row, j);
      for (int64_t j = 0; j < p.cols; ++j) refined.set(j, refined.mask[j]);
      refined.error = refined.pruned_error();
      if (p.sums != nullptr) p.sums[2 * row] = refined.error;
      if (p.m > 0) {
        refined.refine_groups();
      } else {
        refined.refine();
      }
      if (p.sums != nullptr) p.sums[2 * row + 1] = refined.pruned_error();
      p.swaps[row] = refined.swaps;
    }
  }
}

template <class Vector>
void refine_run(const RefineParams& params, int64_t begin, int64_t end) {
  const HonourDenormals honour_denormals;
  by_dtype(params.dtype,
           [&](auto dtype) { refine_rows<Vector, decltype(dtype)::value>(params, begin, end); });
}

}  // namespace
}  // namespace wanda::cpu
