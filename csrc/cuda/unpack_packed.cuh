// Packed weights back to dense ones, for products with many rows of x.
//
// Assumes: cols a multiple of 64; `dense` 16-byte aligned, contiguous.
//
// unpack_bitmap_kernel: a block a row, four elements a lane (bitmap.cuh).
// unpack_sparse24_kernel: 8 elements a thread.
#pragma once

#include "bitmap.cuh"

namespace wanda::cuda {

template <Dtype kDtype>
__global__ void __launch_bounds__(kBitmapWarps* kWarp)
    unpack_bitmap_kernel(const PackedWeight weight, void* dense, const int stages) {
  using Bits = typename Element<kDtype>::Bits;
  WANDA_DYNAMIC_SHARED(memory);
  const int64_t row = blockIdx.x;
  Bits* const to = static_cast<Bits*>(dense) + row * weight.cols;
  walk_bitmap<kDtype, 1>(weight, row, memory, stages,
                         [&](uint32_t first, uint32_t offset, const Quad(&quads)[1]) {
                           const uint32_t column = first + offset;
                           if (column >= static_cast<uint32_t>(weight.cols)) return;
                           Bits element[4];
                           quad_values(quads[0], element);
                           if constexpr (kDtype == Dtype::kFloat32) {
                             store_16(to + column, element[0], element[1], element[2], element[3]);
                           } else {
                             *reinterpret_cast<uint2*>(to + column) =
                                 make_uint2(element[0] | static_cast<uint32_t>(element[1]) << 16,
                                            element[2] | static_cast<uint32_t>(element[3]) << 16);
                           }
                         });
}

template <Dtype kDtype>
__global__ void __launch_bounds__(256) unpack_sparse24_kernel(const PackedWeight weight, void* dense) {
  using Bits = typename Element<kDtype>::Bits;
  const int64_t eight = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (eight >= weight.rows * (weight.cols / 8)) return;
  const uint32_t codes = __ldg(weight.codes + eight);
  const Bits* const from = static_cast<const Bits*>(weight.values) + eight * 4;
  Bits values[4];
  if constexpr (kDtype == Dtype::kFloat32) {
    const uint4 four = load_16(from);
    for (int i = 0; i < 4; ++i) values[i] = component(four, i);
  } else {
    const uint2 four = *reinterpret_cast<const uint2*>(from);
    for (int i = 0; i < 4; ++i) values[i] = static_cast<Bits>((i < 2 ? four.x : four.y) >> (i % 2 * 16));
  }
  uint32_t words[2 * sizeof(Bits)] = {};
#pragma unroll
  for (uint32_t i = 0; i < 8; ++i) {
    const uint32_t group = i / 4, first = codes >> (4 * group) & 3, second = codes >> (4 * group + 2) & 3;
    const Bits element = i % 4 == first    ? values[2 * group]
                         : i % 4 == second ? values[2 * group + 1]
                                           : Bits{0};
    words[i * sizeof(Bits) / 4] |= static_cast<uint32_t>(element) << (i * sizeof(Bits) % 4 * 8);
  }
  Bits* const to = static_cast<Bits*>(dense) + eight * 8;
#pragma unroll
  for (int w = 0; w < static_cast<int>(2 * sizeof(Bits)); w += 4) {
    store_16(to + w * 4 / sizeof(Bits), words[w], words[w + 1], words[w + 2], words[w + 3]);
  }
}

}  // namespace wanda::cuda
