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
  int64_t matrices = 1;  // the grid's second dimension
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

// ---- Selection: prune_rows_, prune_nm_ and their masks.

// Matrices are the grid's second dimension: a block never has rows of two, so whatever it stages or holds of
// the norms is that of one. A plan's grid is that of one matrix.
constexpr int64_t kMostMatrices = 65535;

template <class Params>
int64_t matrices_of(const Params& params) {
  return params.rows / params.norm_rows;
}

// Of a matrix, for blocks that take row after row: about `in_all`.
template <class Params>
int64_t blocks_of_matrix(const Params& params, int64_t in_all) {
  return std::min(params.norm_rows, divide_up(in_all, matrices_of(params)));
}

// ---- rows.cuh.

enum class RowsPath : int { kStaged, kDirect, kAny };

struct RowsTuning {
  float distance;          // of log2 of the k-th smallest score from the mean log2, for a block's first row
  float half_width;        // of the bracket, as a share of the guess
  float first_half_width;  // of a block's first row
  float inverse_cols;
  int halves;  // of rows in shared memory: 2, 3 or 4. The direct kernel has none
};

struct RowsPlan {
  RowsPath path;
  int quads;  // of four elements, a thread
  int threads;
  int64_t grid;  // of a matrix. 0: rows_grid, by how many blocks fit the device
  RowsTuning tuning;
};

// At most, for `quads` a thread: 896 leaves 72 registers a thread, 256 as many as there are.
constexpr int rows_threads(int quads) { return quads == 4 ? 128 : quads == 16 ? 896 : 256; }
constexpr int64_t kRowsSharedBytes = 4112;  // sizeof(RowsShared)
constexpr int64_t kReservedBytes = 1024;    // of shared memory, that the system keeps of each block's

constexpr int64_t warp_columns(int quads) { return int64_t{kWarp} * 4 * quads; }

inline int64_t rows_shared_bytes(const RowsPlan& plan, Dtype dtype) {
  const int64_t chunk = 16 / bytes_of(dtype), half = divide_up(4 * plan.quads / chunk, 2);  // chunks a thread
  return kRowsSharedBytes + plan.tuning.halves * plan.threads * 16 * half;
}

// Blocks that stay and take every grid-th row learn the distance; equal shares leave the shortest tail.
// `resident`: as many as the device holds. Of several matrices: rounds of resident blocks times a block's
// rows are the least, a block's start counted as half a row, as its first row takes half as long again.
inline int64_t rows_grid(int64_t rows, int64_t matrices, int64_t resident) {
  resident = std::max<int64_t>(1, resident);
  if (matrices == 1) return divide_up(rows, divide_up(rows, resident));
  int64_t best = 1, least = INT64_MAX;
  for (int64_t blocks = 1; blocks <= rows && (blocks - 1) * matrices < 4 * resident; ++blocks) {
    const int64_t half_rows = divide_up(blocks * matrices, resident) * (2 * divide_up(rows, blocks) + 1);
    if (half_rows >= least) continue;
    least = half_rows;
    best = blocks;
  }
  return best;
}

// How far log2 of |normal|'s `share`-quantile lies above the mean of its buckets (-0.973): the k-th score of
// a plain Gaussian row. Winitzki's approximation of erf^-1, 0.2 % off: the kernel only starts from it.
inline float gaussian_distance(double share) {
  const double s = std::min(std::max(share, 1e-6), 1 - 1e-6);
  const double log = std::log(1 - s * s), half = 2 / (M_PI * 0.147) + log / 2;
  return static_cast<float>(std::log2(2 * (std::sqrt(half * half - log / 0.147) - half)) / 2 + 0.973);
}

// What a row of `cols` columns costs: SASS instructions of one thread (bf16, sm_90: 520 and 14 an element)
// times warps. 22 quads rather than 16 leave 11,008 columns 2 % idle instead of 10 %, and 5,120 8 % instead
// of 17 %.
constexpr int64_t warp_instructions(int quads, int64_t cols) {
  return divide_up(cols, warp_columns(quads)) * (520 + 14 * 4 * quads);
}

// What follows from path, quads and halves.
inline RowsPlan rows_plan(const RowsParams& params, RowsPath path, int quads, int halves) {
  const float half_width = 1.9f / std::sqrt(static_cast<float>(params.cols));
  return {path,
          quads,
          static_cast<int>(divide_up(params.cols, warp_columns(quads)) * kWarp),
          0,
          {gaussian_distance(static_cast<double>(params.k) / static_cast<double>(params.cols)), half_width,
           std::max(half_width, 0.15f), 1.0f / static_cast<float>(params.cols), halves}};
}

inline RowsPlan plan_rows(const RowsParams& params, const Device& device) {
  constexpr int64_t kWidest = rows_threads(16) / kWarp * warp_columns(16);  // held in registers: 57,344
  const int64_t cols = params.cols, bytes = bytes_of(params.dtype);
  if (cols > kWidest || params.k == cols) {
    return {RowsPath::kAny, 0, whole_warps(cols, 512), blocks_of_matrix(params, 4LL * device.processors), {}};
  }
  const auto fits = [&](int quads) {
    return rows_shared_bytes(rows_plan(params, RowsPath::kStaged, quads, 2), params.dtype) <=
           device.shared_bytes;
  };
  const bool wide = cols > 2048 && cols <= warp_columns(22) * rows_threads(22) / kWarp && fits(22) &&
                    warp_instructions(22, cols) < warp_instructions(16, cols);
  const int narrow = cols <= 2048 ? 4 : 16;
  if (!has_aligned_rows(params) || cols * (params.mask == nullptr ? bytes : 1) % 16 != 0 || !fits(narrow)) {
    return rows_plan(params, RowsPath::kDirect, narrow, 0);
  }
  const int quads = wide ? 22 : narrow;
  // About 512 threads a processor, and as many halves of rows on their way as its shared memory holds.
  RowsPlan best = rows_plan(params, RowsPath::kStaged, quads, 2);
  int64_t most = 0;
  for (const int64_t blocks : {divide_up(512, best.threads), std::max<int64_t>(1, 512 / best.threads)}) {
    for (const int halves : {4, 3, 2}) {
      const bool has_whole_halves = 4 * quads * bytes / 16 % 2 == 0;  // which is what three buffers take
      const RowsPlan plan = rows_plan(params, RowsPath::kStaged, quads, halves);
      const int64_t needed = rows_shared_bytes(plan, params.dtype);
      if (needed > device.shared_bytes / blocks - (blocks > 1 ? kReservedBytes : 0)) continue;
      if (halves == 3 && !has_whole_halves) continue;
      if (blocks * halves > most || (blocks * halves == most && halves > best.tuning.halves)) {
        most = blocks * halves;
        best = plan;
      }
    }
  }
  return best;
}

// ---- nm.cuh, nm_any.cuh, and rows_any.cuh for greater groups.

enum class NmPath : int { kVector, kTiles, kSegments };

struct NmPlan {
  NmPath path;
  int kept;  // known to the compiler; 0: counted at run time
  int threads;
  int64_t grid;  // of a matrix
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
            divide_up(params.norm_rows, nm_rows(m, output))};
  }
  const int64_t grid = blocks_of_matrix(params, 16LL * device.processors);
  if (m <= 32) return {NmPath::kTiles, 0, whole_warps(params.cols / m, kNmAnyThreads), grid};
  return {NmPath::kSegments, 0, whole_warps(m, 512), grid};
}

// ---- refine.cuh, refine_products.cuh.

constexpr int kRefineThreads = 896;            // at most: leaves 72 registers a thread
constexpr int64_t kRefineSharedBytes = 1792;   // sizeof(RefineShared)
constexpr int64_t kRefineBytes = 256LL << 20;  // of c, at a time

constexpr int kProductRows = 64, kProductCols = 64, kProductDepth = 16, kProductThreads = 128;
constexpr int64_t kProductSharedBytes = 2 * kProductDepth * (kProductRows + 2 + kProductCols) * 8;
constexpr int kErrorRows = 32, kErrorCols = 64, kErrorThreads = 256;
constexpr int64_t kErrorSharedBytes = 2 * kErrorRows * (kErrorCols + 1) * 8;

// Where a row's state is: all of it in shared memory, c alone, or none.
enum class RefinePlace : int { kStaged, kShared, kGlobal };

struct RefinePlan {
  RefinePlace place;
  int width;     // columns that a thread takes at once: 1 or 2
  int threads;   // of a row
  int lanes;     // of a group
  int64_t band;  // rows at a time
};

// What is made of the rows of a band before they are refined.
struct RefineBand {
  double* c;              // [rows, cols]
  const float* diagonal;  // [cols], of the Gram matrix
  double* errors;         // of row r: errors[r * error_stride]
  int64_t error_stride;
  int64_t first;  // its first row
  int64_t rows;
};

inline int64_t refine_shared_bytes(RefinePlace place, const RefineParams& params) {
  const int64_t of_column = place == RefinePlace::kStaged   ? 16 + bytes_of(params.dtype)
                            : place == RefinePlace::kShared ? 8
                                                            : 0;
  return kRefineSharedBytes + params.cols * of_column;
}

// 16 columns a thread: fewer cost more in what the threads of a block tell each other.
inline RefinePlan refine_plan(const RefineParams& params, RefinePlace place, bool pairs) {
  int lanes = 1;
  while (2 * lanes <= std::min<int64_t>(params.m, kWarp)) lanes *= 2;
  return {place, pairs ? 2 : 1, whole_warps(divide_up(params.cols, 16), kRefineThreads), lanes,
          std::max<int64_t>(1, kRefineBytes / 8 / std::max<int64_t>(1, params.cols))};
}

inline RefinePlan plan_refine(const RefineParams& params, const Device& device) {
  RefinePlace place = RefinePlace::kGlobal;
  for (const RefinePlace better : {RefinePlace::kShared, RefinePlace::kStaged}) {
    if (refine_shared_bytes(better, params) <= device.shared_bytes) place = better;
  }
  return refine_plan(params, place,
                     params.cols % 2 == 0 && is_aligned(params.weight) && is_aligned(params.gram) &&
                         is_aligned(params.mask));
}

// ---- pack_24.cuh: a thread takes 4 rows by 32 columns, a warp 32 by 128.

constexpr int kPackThreads = 128;

inline int64_t pack_24_grid(int64_t rows, int64_t cols) {
  return divide_up(rows / 32 * divide_up(cols, 128) * kWarp, kPackThreads);
}

// ---- bitmap_linear.cuh, sparse24_linear.cuh, unpack_packed.cuh.

constexpr int kBitmapWarps = 8;          // at most in a block
constexpr int kSparse24Cols = 128;       // of a stage
constexpr int kSparse24Warps = 8;        // at most in a block
constexpr int64_t kBitmapTokens = 8;     // at most in one launch
constexpr int64_t kSparse24Tokens = 32;  // at most in one launch
constexpr int64_t kUnpackThreads = 256;  // of unpack_sparse24_kernel, eight elements each

struct LinearPlan {
  int rows;    // of a block: 2 or 4; 2:4: 16 or 32, with slices of a row counted apart
  int room;    // tokens, in 2:4 times slices, that there is room for
  int slices;  // 2:4: of the columns: 1, 2, 4 or 8
  int stages;  // of a warp, in shared memory
  int threads;
};

// ---- bitmap.cuh: a stage has the words of 1024 elements, and their values of each row with what aligns
// them.

constexpr int kBitmapStages = 2;  // of a warp, at most
constexpr int bitmap_row_bytes(Dtype dtype, int rows) { return 32 * kWarp / rows * bytes_of(dtype) + 32; }
constexpr int bitmap_stage_bytes(Dtype dtype, int rows) {
  return kWarp * 8 + rows * bitmap_row_bytes(dtype, rows);
}

inline LinearPlan bitmap_plan(const PackedWeight& weight, int64_t tokens, int rows, int64_t most_warps) {
  const int64_t items = divide_up(weight.cols * rows, 32 * kWarp), warps = std::min(most_warps, items);
  const int64_t stages = std::min<int64_t>(kBitmapStages, divide_up(items, warps));
  return {rows,
          tokens <= 2   ? static_cast<int>(tokens)
          : tokens <= 4 ? 4
                        : 8,
          1, static_cast<int>(stages), static_cast<int>(warps * kWarp)};
}

// What 48 KB of shared memory hold.
constexpr int bitmap_warps(Dtype dtype, int rows) {
  return rows == 4 || dtype == Dtype::kFloat32 ? kBitmapWarps / 2 : kBitmapWarps;
}

// Four rows a block share the loads of x; where that leaves processors without a block, two.
inline LinearPlan plan_bitmap_linear(const PackedWeight& weight, int64_t tokens, const Device& device) {
  const int rows = weight.rows < 12LL * device.processors ? 2 : 4;
  return bitmap_plan(weight, tokens, rows, bitmap_warps(weight.dtype, rows));
}

// A block a row.
inline LinearPlan plan_unpack_bitmap(const PackedWeight& weight) {
  return bitmap_plan(weight, 0, 1, bitmap_warps(weight.dtype, 1));
}

inline int64_t bitmap_shared_bytes(const LinearPlan& plan, Dtype dtype) {
  return plan.threads / kWarp *
         (int64_t{plan.stages} * bitmap_stage_bytes(dtype, plan.rows) + plan.rows * plan.room * 4);
}

// ---- sparse24_linear.cuh.

// Stages that keep enough bytes on their way; those of many tokens hold more x than weights.
constexpr int sparse24_stages(int room) { return room <= 8 ? 3 : 2; }

// Of a warp's stage: values of the rows, their codes, and `columns` rows of x.
constexpr int sparse24_stage_bytes(int rows, int columns) {
  return rows * (kSparse24Cols + kSparse24Cols / 8) + columns * kSparse24Cols * 2;
}

// Of a block. The warps' sums take the place of their stages.
constexpr int64_t sparse24_shared_bytes(const LinearPlan& plan, int columns) {
  return int64_t{plan.threads / kWarp} * plan.stages * sparse24_stage_bytes(plan.rows, columns);
}

// What follows from rows of a block, slices and warps.
inline LinearPlan sparse24_plan(const PackedWeight& weight, int64_t tokens, int rows, int slices,
                                int64_t most_warps) {
  const int64_t columns = tokens * slices, stretches = divide_up(weight.cols / slices, kSparse24Cols);
  const int room = columns <= 2 ? 2 : columns <= 8 ? 8 : columns <= 16 ? 16 : 32;
  const int64_t warps = std::min(most_warps, stretches);
  const int64_t stages = std::min<int64_t>(sparse24_stages(room), divide_up(stretches, warps));
  return {rows, room, slices, static_cast<int>(stages), static_cast<int>(warps * kWarp)};
}

inline LinearPlan plan_sparse24_linear(const PackedWeight& weight, int64_t tokens, const Device& device) {
  // Few rows: slices of the columns make more blocks, two for each processor.
  int slices = 1;
  while (2 * slices * tokens <= 8 && weight.cols / 64 % (2 * slices) == 0 &&
         weight.rows * slices < 32LL * device.processors) {
    slices *= 2;
  }
  // For more than eight tokens a block reads more x than weights: 32 rows halve that. As many warps as let a
  // processor's blocks, up to four, be there at once.
  const int rows = tokens > 8 && weight.rows >= 24LL * device.processors ? 32 : 16;
  const int64_t blocks =
      std::clamp<int64_t>(divide_up(weight.rows * slices, int64_t{rows} * device.processors), 1, 4);
  const LinearPlan one = sparse24_plan(weight, tokens, rows, slices, 1);
  const int64_t fit = device.shared_bytes / (blocks * sparse24_shared_bytes(one, one.room));
  return sparse24_plan(weight, tokens, rows, slices,
                       std::clamp<int64_t>(fit, 1, blocks == 1 ? kSparse24Warps : kSparse24Warps / 2));
}

// ---- experts.cuh: room for twice the tokens that an expert has on average. More blocks than those of a
// weight's rows make slices needless.

constexpr int64_t kExpertsTokens = 16;  // on average, at most: more go through the unpacked weights

constexpr int64_t experts_room(const PackedExpertsParams& params, int64_t most) {
  return std::clamp<int64_t>(divide_up(2 * params.tokens, params.experts), 1, most);
}

inline LinearPlan plan_bitmap_experts(const PackedExpertsParams& params, const Device& device) {
  const int64_t at_work = params.stack.rows / params.experts * std::min(params.experts, params.tokens);
  const int rows = at_work < 12LL * device.processors ? 2 : 4;
  return bitmap_plan(params.stack, experts_room(params, kBitmapTokens), rows,
                     bitmap_warps(params.stack.dtype, rows));
}

inline LinearPlan plan_sparse24_experts(const PackedExpertsParams& params) {
  return sparse24_plan(params.stack, experts_room(params, kSparse24Tokens), 16, 1, kSparse24Warps / 2);
}

// ---- sqnorm.cuh. Blocks of a segment are as many as those of a sequence: how long it is only the device
// knows.

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
