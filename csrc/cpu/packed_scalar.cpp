// Packed sparse weights without intrinsics. See packed.h.
#include "packed_impl.h"

namespace wanda::cpu {
namespace {

PackedLayout layout(PackedFormat, Dtype) { return {8, true}; }

template <Dtype dtype>
void product_typed(const PackedWeight& w, const float* x, int64_t batch, float* sums, int64_t begin,
                   int64_t end) {
  const auto* values = static_cast<const typename Element<dtype>::Bits*>(w.values);
  const int64_t slab = batch < kPackedSlab ? batch : kPackedSlab;
  for (int64_t row = begin; row < end; ++row) {
    for (int64_t first = 0; first < batch; first += slab) {
      float* out = sums + row * batch + first;
      for (int64_t b = 0; b < slab; ++b) out[b] = 0.0f;
      const auto* next = values + packed_start(w, row);
      for (int64_t byte = 0; byte < w.cols / 8; ++byte) {
        for (uint32_t mask = packed_mask(w.format, w.codes[row * (w.cols / 8) + byte]); mask != 0;
             mask &= mask - 1) {
          const float value = to_float<dtype>(*next++);
          const float* column = x + first * w.cols + byte * slab * 8 + __builtin_ctz(mask);
          for (int64_t b = 0; b < slab; ++b) out[b] += value * column[b * 8];
        }
      }
    }
  }
}

void product(const PackedWeight& w, const void* x, int64_t batch, float* sums, int64_t begin, int64_t end) {
  by_dtype(w.dtype, [&](auto constant) {
    constexpr Dtype dtype = decltype(constant)::value;
    product_typed<dtype>(w, static_cast<const float*>(x), batch, sums, begin, end);
  });
}

template <Dtype dtype>
void unpack_typed(const PackedWeight& w, typename Element<dtype>::Bits* dense, int64_t begin, int64_t end) {
  const auto* values = static_cast<const typename Element<dtype>::Bits*>(w.values);
  for (int64_t row = begin; row < end; ++row) {
    auto* out = dense + row * w.cols;
    for (int64_t j = 0; j < w.cols; ++j) out[j] = 0;
    const auto* next = values + packed_start(w, row);
    for (int64_t byte = 0; byte < w.cols / 8; ++byte) {
      for (uint32_t mask = packed_mask(w.format, w.codes[row * (w.cols / 8) + byte]); mask != 0;
           mask &= mask - 1) {
        out[byte * 8 + __builtin_ctz(mask)] = *next++;
      }
    }
  }
}

void unpack(const PackedWeight& w, void* dense, int64_t begin, int64_t end) {
  by_dtype(w.dtype, [&](auto constant) {
    constexpr Dtype dtype = decltype(constant)::value;
    unpack_typed<dtype>(w, static_cast<typename Element<dtype>::Bits*>(dense), begin, end);
  });
}

}  // namespace

PackedKernels packed_scalar() { return {&layout, &product, &unpack}; }

}  // namespace wanda::cpu
