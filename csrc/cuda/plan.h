// What is chosen for a launch: the kernel's variant, blocks, threads. Plain functions, without torch and
// without CUDA's headers: the operators (operators.cpp) and the simulator's tests (tests/simt) call the same.
#pragma once

#include <algorithm>
#include <cmath>

#include "../common/params.h"

namespace wanda::cuda {

constexpr int kWarp = 32;

struct Device {
  int processors = 0;
  int shared_bytes = 0;  // that a block may have
};

struct Shape {
  int64_t grid;
  int64_t threads;
  int64_t shared_bytes;
};

// What a selection writes.
enum class Output : int { kPrune, kPruneAndSum, kMask };

template <class Params>
Output output_of(const Params& params) {
  return params.mask != nullptr         ? Output::kMask
         : params.score_sums != nullptr ? Output::kPruneAndSum
                                        : Output::kPrune;
}

constexpr int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int bytes_of(Dtype dtype) { return dtype == Dtype::kFloat32 ? 4 : 2; }
inline bool is_aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }
inline int whole_warps(int64_t threads, int most) {
  return static_cast<int>(std::clamp<int64_t>(divide_up(threads, kWarp) * kWarp, kWarp, most));
}

// Whether weights, norms and mask can be walked 16 bytes a lane.
template <class Params>
bool has_aligned_rows(const Params& params) {
  return is_aligned(params.weight) && is_aligned(params.norm) && is_aligned(params.mask) &&
         params.row_stride * bytes_of(params.dtype) % 16 == 0;
}

// ---- rows.cuh.

enum class RowsPath : int { kStaged, kDirect, kAny };

struct RowsTuning {
  float distance;          // of log2 of the k-th smallest score from the mean log2, for a block's first row
  float half_width;        // of the bracket, as a share of the guess
  float first_half_width;  // of a block's first row
  float inverse_cols;
  int stages;  // rows in shared memory: 1, or 2 to load the next row while this one is worked on.
               // The direct kernel has none
};

struct RowsPlan {
  RowsPath path;
  int quads;  // of four elements, a thread
  int threads;
  int64_t grid;  // 0: rows_grid, by how many blocks fit the device
  RowsTuning tuning;
};

// At most, for `quads` a thread: 896 leaves 72 registers a thread, 256 as many as there are.
constexpr int rows_threads(int quads) { return quads == 4 ? 128 : quads == 16 ? 896 : 256; }
constexpr int64_t kRowsSharedBytes = 4112;  // sizeof(RowsShared)

constexpr int64_t warp_columns(int quads) { return int64_t{kWarp} * 4 * quads; }

inline int64_t rows_shared_bytes(const RowsPlan& plan, Dtype dtype) {
  return kRowsSharedBytes + int64_t{plan.tuning.stages} * plan.threads * 4 * plan.quads * bytes_of(dtype);
}

// Blocks that stay and take every grid-th row learn the distance; equal shares leave the shortest tail.
// `resident`: as many as the device holds.
inline int64_t rows_grid(int64_t rows, int64_t resident) {
  return divide_up(rows, divide_up(rows, std::max<int64_t>(1, resident)));
}

// How far log2 of |normal|'s `share`-quantile lies above the mean of its buckets (-0.973): the k-th score of
// a plain Gaussian row. Winitzki's approximation of erf^-1, 0.2 % off: the kernel only starts from it.
inline float gaussian_distance(double share) {
  const double s = std::min(std::max(share, 1e-6), 1 - 1e-6);
  const double log = std::log(1 - s * s), half = 2 / (M_PI * 0.147) + log / 2;
  return static_cast<float>(std::log2(2 * (std::sqrt(half * half - log / 0.147) - half)) / 2 + 0.973);
}

// What a row of `cols` columns costs: SASS instructions of one thread (bf16, sm_90: 461 and 16 an element)
// times warps. 22 quads rather than 16 leave 11,008 columns 2 % idle instead of 10 %, and 5,120 8 % instead
// of 17 %.
constexpr int64_t warp_instructions(int quads, int64_t cols) {
  return divide_up(cols, warp_columns(quads)) * (461 + 16 * 4 * quads);
}

// What follows from path, quads and stages.
inline RowsPlan rows_plan(const RowsParams& params, RowsPath path, int quads, int stages) {
  const float half_width = 2.56f / std::sqrt(static_cast<float>(params.cols));
  return {path,
          quads,
          static_cast<int>(divide_up(params.cols, warp_columns(quads)) * kWarp),
          0,
          {gaussian_distance(static_cast<double>(params.k) / static_cast<double>(params.cols)), half_width,
           std::max(half_width, 0.15f), 1.0f / static_cast<float>(params.cols), stages}};
}

inline RowsPlan plan_rows(const RowsParams& params, const Device& device) {
  constexpr int64_t kWidest = rows_threads(16) / kWarp * warp_columns(16);  // held in registers: 57,344
  const int64_t cols = params.cols, bytes = bytes_of(params.dtype);
  if (cols > kWidest || params.k == cols) {
    return {RowsPath::kAny,
            0,
            whole_warps(cols, 512),
            std::min<int64_t>(params.rows, 4LL * device.processors),
            {}};
  }
  const bool staged = has_aligned_rows(params) && cols * (params.mask == nullptr ? bytes : 1) % 16 == 0 &&
                      divide_up(cols, 2048) * 2048 * bytes + kRowsSharedBytes <= device.shared_bytes;
  const bool wide = staged && cols <= warp_columns(22) * rows_threads(22) / kWarp &&
                    warp_instructions(22, cols) < warp_instructions(16, cols);
  const int quads = cols <= 2048 ? 4 : wide ? 22 : 16;
  if (!staged) return rows_plan(params, RowsPath::kDirect, quads, 0);
  // Two blocks and more on a processor hide each other's loads; a block alone loads its next row ahead.
  const RowsPlan two = rows_plan(params, RowsPath::kStaged, quads, 2);
  if (two.threads > 512 && rows_shared_bytes(two, params.dtype) <= device.shared_bytes) return two;
  return rows_plan(params, RowsPath::kStaged, quads, 1);
}

// ---- nm.cuh, nm_any.cuh, and rows_any.cuh for greater groups.

enum class NmPath : int { kVector, kTiles, kSegments };

struct NmPlan {
  NmPath path;
  int kept;  // known to the compiler; 0: counted at run time
  int threads;
  int64_t grid;
};

constexpr int kNmAnyThreads = 128;  // at most

// Rows that a block of nm_kernel works on side by side. A group of 16 or 32 fills a thread's registers by
// itself.
constexpr int nm_rows(int64_t m, Output output) { return m > 8 ? 1 : output == Output::kMask ? 2 : 4; }

// Elements that a thread takes at once: 16 bytes of what it writes, and a group.
constexpr int64_t nm_width(Dtype dtype, int64_t m, Output output) {
  return std::max<int64_t>(m, output == Output::kMask ? 16 : 16 / bytes_of(dtype));
}

inline NmPlan plan_nm(const NmParams& params, const Device& device) {
  const int64_t m = params.m;
  const Output output = output_of(params);
  const int64_t width = nm_width(params.dtype, m, output);
  if (has_aligned_rows(params) && params.cols % width == 0 &&
      (m == 2 || m == 4 || m == 8 || m == 16 || m == 32)) {
    // As many threads as leave the last pass over a row nearly full.
    const int64_t units = params.cols / width;
    return {NmPath::kVector, static_cast<int>(m == 4 || (m == 8 && params.n == 4) ? params.n : 0),
            static_cast<int>(divide_up(divide_up(units, divide_up(units, 256)), kWarp) * kWarp),
            divide_up(params.rows, nm_rows(m, output))};
  }
  const int64_t grid = std::min<int64_t>(params.rows, 16LL * device.processors);
  if (m <= 32) return {NmPath::kTiles, 0, whole_warps(params.cols / m, kNmAnyThreads), grid};
  return {NmPath::kSegments, 0, whole_warps(m, 512), grid};
}

// ---- pack_24.cuh: a thread takes 4 rows by 32 columns, a warp 32 by 128.

constexpr int kPackThreads = 256;

inline int64_t pack_24_grid(int64_t rows, int64_t cols) {
  return divide_up(rows / 32 * divide_up(cols, 128) * kWarp, kPackThreads);
}

// ---- bitmap_linear.cuh, sparse24_linear.cuh, unpack_packed.cuh.

constexpr int kPieceCols = 32 * kWarp;   // of a bitmap's row, a warp
constexpr int kBitmapWarps = 8;          // at most in a block
constexpr int kBitmapLinearRows = 4;     // of a block
constexpr int kSparse24Warps = 8;        // at most in a block
constexpr int64_t kBitmapTokens = 8;     // at most in one launch
constexpr int64_t kSparse24Tokens = 32;  // at most in one launch
constexpr int64_t kUnpackThreads = 256;  // of unpack_sparse24_kernel, eight elements each

struct LinearPlan {
  int row_tiles;    // 2:4: of 16 rows, a block
  int token_tiles;  // 2:4: of 8 tokens; bitmap: tokens that there is room for
  int threads;
};

// As many warps as leave the last round over a row nearly full.
inline int bitmap_threads(int64_t cols) {
  const int64_t pieces = divide_up(cols, kPieceCols);
  return static_cast<int>(divide_up(pieces, divide_up(pieces, kBitmapWarps)) * kWarp);
}

inline LinearPlan plan_bitmap_linear(const PackedWeight& weight, int64_t tokens) {
  return {0, tokens <= 2 ? static_cast<int>(tokens) : tokens <= 4 ? 4 : 8, bitmap_threads(weight.cols)};
}

// 32 rows a block halve the loads of x; where that leaves processors without a block, 16.
inline LinearPlan plan_sparse24_linear(const PackedWeight& weight, int64_t tokens, const Device& device) {
  return {weight.rows >= 32LL * device.processors ? 2 : 1,
          tokens <= 8    ? 1
          : tokens <= 16 ? 2
                         : 4,
          static_cast<int>(std::min<int64_t>(kSparse24Warps, weight.cols / 64) * kWarp)};
}

// ---- sqnorm.cuh.

constexpr int64_t kSqnormChunk = 4096;  // tokens that are added in float32
constexpr int kSqnormWarps = 16;
constexpr int kSqnormLanes = 4;   // of a token: 64 bytes
constexpr int kSqnormRows = 128;  // tokens of a block at a time

// Columns of a block, for so many a lane.
template <int kVector>
constexpr int kSqnormCols = kVector == 1 ? kWarp : kSqnormLanes * kVector;

// Columns of a lane: one, or those of 16 bytes.
inline int sqnorm_vector(const SqnormParams& params) {
  const int64_t chunk = 16 / bytes_of(params.dtype);
  const bool is_vector = is_aligned(params.x) && params.cols % chunk == 0 &&
                         params.token_stride % chunk == 0 && params.sequence_stride % chunk == 0;
  return is_vector ? static_cast<int>(chunk) : 1;
}

inline Shape sqnorm_shape(const SqnormParams& params, int vector) {
  const int cols = vector == 1 ? kSqnormCols<1> : vector == 4 ? kSqnormCols<4> : kSqnormCols<8>;
  return {divide_up(params.cols, cols) * (params.is_shared ? 1 : params.sequences), kSqnormWarps * kWarp,
          kSqnormWarps * cols * static_cast<int64_t>(sizeof(float))};
}

}  // namespace wanda::cuda
