// What the packed kernels share. Included by packed_<isa>.cpp after the target pragma.
#pragma once

#include "convert.h"
#include "packed.h"

namespace wanda::cpu {
namespace {

// Entry i: the columns of eight that a 2:4 code byte keeps, as bits.
struct PackedMasks {
  uint8_t entry[256];
  constexpr PackedMasks() : entry() {
    for (uint32_t i = 0; i < 256; ++i) {
      const uint32_t low = 1u << (i & 3) | 1u << (i >> 2 & 3);
      const uint32_t high = 1u << (i >> 4 & 3) | 1u << (i >> 6 & 3);
      entry[i] = static_cast<uint8_t>(low | high << 4);
    }
  }
};
constexpr PackedMasks kPackedMasks;

// The kept columns of eight, as bits.
inline uint32_t packed_mask(PackedFormat format, uint8_t code) {
  return format == PackedFormat::kBitmap ? code : kPackedMasks.entry[code];
}

inline int64_t packed_start(const PackedWeight& w, int64_t row) {
  return w.starts != nullptr ? w.starts[row] : row * (w.cols / 2);
}

// f(Constant<rows of x in a slab>{}).
template <class F>
void packed_by_slab(int64_t batch, F f) {
  switch (batch) {
    case 1:
      return f(Constant<int64_t{1}>{});
    case 2:
      return f(Constant<int64_t{2}>{});
    case 4:
      return f(Constant<int64_t{4}>{});
    default:
      return f(Constant<kPackedSlab>{});
  }
}

}  // namespace
}  // namespace wanda::cpu
