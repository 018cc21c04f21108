// The inverse of 2:4 packing. Blocks of 32 rows x 32 columns: their metadata is 128 contiguous bytes
// (pack_24_impl.h).
#include "pack_24.h"

#include "pack_24_impl.h"

namespace wanda::cpu {

void unpack_24(const Unpack24Params& p, int64_t begin, int64_t end) {
  for (int64_t first = begin; first < end;) {
    const int64_t block_end = (first / kPackRows + 1) * kPackRows;
    const int64_t last = end < block_end ? end : block_end;
    for (int64_t column = 0; column < p.cols / 16; column += 2) {
      for (int64_t row = first; row < last; ++row) {
        for (int64_t c = column; c < column + 2; ++c) {
          const uint32_t metadata = p.metadata[pack_24_position(row, c, p.rows)];
          const uint16_t* values = p.values + row * (p.cols / 2) + c * 8;
          uint16_t* w = p.weight + row * p.cols + c * 16;
          for (int j = 0; j < 16; ++j) w[j] = 0;
          for (int i = 0; i < 8; ++i) w[i / 2 * 4 + (metadata >> (2 * i) & 3)] = values[i];
        }
      }
    }
    first = last;
  }
}

}  // namespace wanda::cpu
