// Packed sparse weights on the CPU: products with a few rows of x, and unpacking. Torch-free; see
// packed_impl.h.
//
// Both formats keep the weights that are not +0 in order, and one code byte for every eight columns:
//   bitmap    bit i: column i is kept. Row r's values begin at rows[r].
//   2:4       two of every four columns are kept, their indices in ascending order: bits 0-3 for the first
//   four
//             columns (index 0 | index 1 << 2), bits 4-7 for the others. Row r's values begin at r * cols
//             / 2.
#pragma once

#include "../common/dtype.h"

namespace wanda::cpu {

enum class PackedFormat : int { kBitmap, kSparse24 };

// Products of bitmaps may read this many values past the last one: they load whole registers.
constexpr int64_t kPackedPadding = 32;
constexpr int64_t kPackedColumns = 64;  // cols is a multiple
constexpr int64_t kPackedBatch = 32;    // rows of x at most
constexpr int64_t kPackedSlab = 8;      // rows of x that a kernel takes at once

struct PackedWeight {
  PackedFormat format;
  Dtype dtype;
  const void* values;     // kPackedPadding more than there are (bitmap)
  const uint8_t* codes;   // [rows, cols / 8]
  const int32_t* starts;  // [rows + 1] (bitmap); nullptr (2:4)
  int64_t rows;
  int64_t cols;
};

// How a kernel wants x: slabs of at most kPackedSlab rows, each contiguous; in a slab blocks of `unit`
// columns; in a block the slab's rows one after the other. `as_float`: float32, else the dtype of the
// weights.
struct PackedLayout {
  int64_t unit;
  bool as_float;
};

// sums[row * batch + b] = W[row] . x[b] for rows [begin, end); batch of 1, 2, 4, or whole slabs; x aligned to
// 64 bytes. One thread; disjoint ranges may run at the same time.
struct PackedKernels {
  PackedLayout (*layout)(PackedFormat format, Dtype dtype);
  void (*product)(const PackedWeight& weight, const void* x, int64_t batch, float* sums, int64_t begin,
                  int64_t end);
  void (*unpack)(const PackedWeight& weight, void* dense, int64_t begin,
                 int64_t end);  // [rows, cols] contiguous
};

PackedKernels packed_scalar();
PackedKernels packed_avx2();
PackedKernels packed_avx512();  // needs AVX-512 VBMI, VBMI2 and BF16 too

}  // namespace wanda::cpu
