// The shipped kernels behind plain C functions, for tests/test_simt.py. Instrumented: see simt.h.
#include "../../csrc/cuda/bitmap_linear.cuh"
#include "../../csrc/cuda/nm.cuh"
#include "../../csrc/cuda/nm_any.cuh"
#include "../../csrc/cuda/pack_24.cuh"
#include "../../csrc/cuda/rows.cuh"
#include "../../csrc/cuda/sparse24_linear.cuh"
#include "../../csrc/cuda/sqnorm.cuh"
#include "../../csrc/cuda/unpack_packed.cuh"

using namespace wanda;
using namespace wanda::cuda;

namespace {

template <Dtype kDtype, int kQuads, RowsOutput kOutput, bool kStaged>
void rows(const RowsParams& params, const RowsTuning& tuning, uint32_t grid) {
  const int64_t width = kWarp * kQuads * 4, blocks_of_columns = (params.cols + width - 1) / width;
  const int64_t stage_bytes = blocks_of_columns * width * sizeof(typename Element<kDtype>::Bits);
  simt::launch({grid, 1, 1}, static_cast<uint32_t>(blocks_of_columns * kWarp),
               sizeof(RowsShared) + (kStaged ? tuning.stages * stage_bytes : 0),
               [&] { rows_kernel<kDtype, kQuads, kOutput, kStaged>(params, tuning); });
}

template <Dtype kDtype, int kQuads, RowsOutput kOutput>
void rows_source(const RowsParams& params, const RowsTuning& tuning, uint32_t grid) {
  if (tuning.stages > 0) {
    rows<kDtype, kQuads, kOutput, true>(params, tuning, grid);
  } else {
    rows<kDtype, kQuads, kOutput, false>(params, tuning, grid);
  }
}

template <Dtype kDtype, int kQuads>
void rows_output(const RowsParams& params, const RowsTuning& tuning, uint32_t grid) {
  if (params.mask != nullptr) {
    rows_source<kDtype, kQuads, RowsOutput::kMask>(params, tuning, grid);
  } else if (params.score_sums != nullptr) {
    rows_source<kDtype, kQuads, RowsOutput::kPruneAndSum>(params, tuning, grid);
  } else {
    rows_source<kDtype, kQuads, RowsOutput::kPrune>(params, tuning, grid);
  }
}

template <Dtype kDtype, int kM, int kKept, NmOutput kOutput>
void nm(const NmParams& params, uint32_t threads) {
  constexpr int kRows = kNmRows<kM, kOutput>;
  simt::launch({static_cast<uint32_t>((params.rows + kRows - 1) / kRows), 1, 1}, threads,
               2 * kRows * kWarp * sizeof(float), [&] { nm_kernel<kDtype, kM, kKept, kOutput>(params); });
}

template <Dtype kDtype, int kM, int kKept>
void nm_output(const NmParams& params, uint32_t threads) {
  if (params.mask != nullptr) {
    nm<kDtype, kM, kKept, NmOutput::kMask>(params, threads);
  } else if (params.score_sums != nullptr) {
    nm<kDtype, kM, kKept, NmOutput::kPruneAndSum>(params, threads);
  } else {
    nm<kDtype, kM, kKept, NmOutput::kPrune>(params, threads);
  }
}

template <Dtype kDtype, int kM>
void nm_any(const NmParams& params, uint32_t grid, uint32_t threads) {
  simt::launch({grid, 1, 1}, threads, sizeof(NmAnyShared<kDtype, kM>),
               [&] { nm_any_kernel<kDtype, kM>(params); });
}

template <Dtype kDtype, int kBatch>
void bitmap_linear(const PackedLinearParams& params, uint32_t threads) {
  const int64_t grid = (params.weight.rows + kBitmapLinearRows - 1) / kBitmapLinearRows;
  simt::launch({static_cast<uint32_t>(grid), 1, 1}, threads, sizeof(BitmapLinearShared<kBatch>),
               [&] { bitmap_linear_kernel<kDtype, kBatch>(params); });
}

template <Dtype kDtype, int kRowTiles, int kTokenTiles>
void sparse24_linear(const PackedLinearParams& params, uint32_t threads) {
  const int64_t grid = (params.weight.rows + 16 * kRowTiles - 1) / (16 * kRowTiles);
  simt::launch({static_cast<uint32_t>(grid), 1, 1}, threads,
               sparse24_shared_bytes(kRowTiles, kTokenTiles, static_cast<int>(threads / kWarp)),
               [&] { sparse24_linear_kernel<kDtype, kRowTiles, kTokenTiles>(params); });
}

template <Dtype kDtype, int kRowTiles>
void sparse24_linear_tokens(const PackedLinearParams& params, uint32_t threads) {
  if (params.tokens <= 8) return sparse24_linear<kDtype, kRowTiles, 1>(params, threads);
  if (params.tokens <= 16) return sparse24_linear<kDtype, kRowTiles, 2>(params, threads);
  sparse24_linear<kDtype, kRowTiles, 4>(params, threads);
}

}  // namespace

extern "C" {

// `quads` a thread: 4, 16 or (staged) 22. tuning.stages == 0: the direct kernel.
void simt_rows(const RowsParams* params, const RowsTuning* tuning, int quads, uint32_t grid) {
  by_dtype(params->dtype, [&](auto dtype) {
    constexpr Dtype kDtype = decltype(dtype)::value;
    if (quads == 4) return rows_output<kDtype, 4>(*params, *tuning, grid);
    if (quads == 16) return rows_output<kDtype, 16>(*params, *tuning, grid);
    rows_output<kDtype, 22>(*params, *tuning, grid);
  });
}

void simt_rows_any(const RowsParams* params, int64_t segment_cols, uint32_t grid, uint32_t threads) {
  by_dtype(params->dtype, [&](auto dtype) {
    simt::launch({grid, 1, 1}, threads, sizeof(RowsAnyShared),
                 [&] { rows_any_kernel<decltype(dtype)::value>(*params, segment_cols); });
  });
}

// `kept`: 0 counts at run time.
void simt_nm(const NmParams* params, uint32_t kept, uint32_t threads) {
  by_dtype(params->dtype, [&](auto dtype) {
    constexpr Dtype kDtype = decltype(dtype)::value;
    if (params->m == 2) return nm_output<kDtype, 2, 0>(*params, threads);
    if (params->m == 8 && kept == 4) return nm_output<kDtype, 8, 4>(*params, threads);
    if (params->m == 8) return nm_output<kDtype, 8, 0>(*params, threads);
    if (params->m == 16) return nm_output<kDtype, 16, 0>(*params, threads);
    if (params->m == 32) return nm_output<kDtype, 32, 0>(*params, threads);
    if (kept == 1) return nm_output<kDtype, 4, 1>(*params, threads);
    if (kept == 2) return nm_output<kDtype, 4, 2>(*params, threads);
    nm_output<kDtype, 4, 3>(*params, threads);
  });
}

void simt_nm_any(const NmParams* params, uint32_t grid, uint32_t threads) {
  by_dtype(params->dtype, [&](auto dtype) {
    constexpr Dtype kDtype = decltype(dtype)::value;
    if (params->m <= 4) return nm_any<kDtype, 4>(*params, grid, threads);
    if (params->m <= 8) return nm_any<kDtype, 8>(*params, grid, threads);
    if (params->m <= 16) return nm_any<kDtype, 16>(*params, grid, threads);
    nm_any<kDtype, 32>(*params, grid, threads);
  });
}

void simt_pack_24(const Pack24Params* params) {
  const uint32_t grid = static_cast<uint32_t>((params->rows / 32 * ((params->cols + 127) / 128) + 7) / 8);
  simt::launch({grid, 1, 1}, kPackThreads, 0, [&] {
    if (params->norm == nullptr) return pack_24_kernel<Dtype::kFloat16, false>(*params);
    if (params->dtype == Dtype::kFloat16) return pack_24_kernel<Dtype::kFloat16, true>(*params);
    pack_24_kernel<Dtype::kBFloat16, true>(*params);
  });
}

void simt_unpack_24(const Unpack24Params* params) {
  const uint32_t grid = static_cast<uint32_t>((params->rows / 32 * ((params->cols + 127) / 128) + 7) / 8);
  simt::launch({grid, 1, 1}, kPackThreads, 0, [&] { unpack_24_kernel(*params); });
}

void simt_bitmap_linear(const PackedLinearParams* params, uint32_t threads) {
  by_dtype(params->weight.dtype, [&](auto dtype) {
    constexpr Dtype kDtype = decltype(dtype)::value;
    if (params->tokens == 1) return bitmap_linear<kDtype, 1>(*params, threads);
    if (params->tokens == 2) return bitmap_linear<kDtype, 2>(*params, threads);
    if (params->tokens <= 4) return bitmap_linear<kDtype, 4>(*params, threads);
    bitmap_linear<kDtype, 8>(*params, threads);
  });
}

void simt_sparse24_linear(const PackedLinearParams* params, int row_tiles, uint32_t threads) {
  if (params->weight.dtype == Dtype::kBFloat16) {
    if (row_tiles == 1) return sparse24_linear_tokens<Dtype::kBFloat16, 1>(*params, threads);
    return sparse24_linear_tokens<Dtype::kBFloat16, 2>(*params, threads);
  }
  if (row_tiles == 1) return sparse24_linear_tokens<Dtype::kFloat16, 1>(*params, threads);
  sparse24_linear_tokens<Dtype::kFloat16, 2>(*params, threads);
}

void simt_unpack_bitmap(const PackedWeight* weight, void* dense, uint32_t threads) {
  by_dtype(weight->dtype, [&](auto dtype) {
    simt::launch({static_cast<uint32_t>(weight->rows), 1, 1}, threads, sizeof(BitmapShared<1>),
                 [&] { unpack_bitmap_kernel<decltype(dtype)::value>(*weight, dense); });
  });
}

void simt_unpack_sparse24(const PackedWeight* weight, void* dense) {
  const uint32_t grid = static_cast<uint32_t>((weight->rows * (weight->cols / 8) + 255) / 256);
  by_dtype(weight->dtype, [&](auto dtype) {
    simt::launch({grid, 1, 1}, 256, 0,
                 [&] { unpack_sparse24_kernel<decltype(dtype)::value>(*weight, dense); });
  });
}

void simt_sqnorm(const SqnormParams* params, int is_vector) {
  const int64_t chunks = params->sequences * sqnorm_chunks(params->tokens);
  by_dtype(params->dtype, [&](auto dtype) {
    constexpr Dtype kDtype = decltype(dtype)::value;
    constexpr int kVector = Element<kDtype>::kChunk;
    const int64_t tile = is_vector ? kWarp * kVector : kWarp;
    const uint32_t grid = static_cast<uint32_t>((params->cols + tile - 1) / tile * chunks);
    simt::launch({grid, 1, 1}, kSqnormWarps * kWarp, sqnorm_shared_bytes(is_vector ? kVector : 1), [&] {
      is_vector ? sqnorm_partial_kernel<kDtype, kVector>(*params) : sqnorm_partial_kernel<kDtype, 1>(*params);
    });
  });
  const int64_t columns = params->cols * (params->is_shared ? 1 : params->sequences);
  simt::launch({static_cast<uint32_t>((columns + 255) / 256), 1, 1}, 256, 0,
               [&] { sqnorm_total_kernel(*params); });
}

}  // extern "C"
