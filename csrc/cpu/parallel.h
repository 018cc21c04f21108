// How rows are split over threads.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>

#include <algorithm>
#include <cstdint>

namespace wanda::cpu {

// work(begin, end) over rows of `cols` elements. A task below some tens of thousands of elements costs more
// to hand to a thread than to run.
template <class Work>
inline void over_rows(int64_t rows, int64_t cols, Work work) {
  if (cols > 0) at::parallel_for(0, rows, std::max<int64_t>(1, 32768 / cols), work);
}

// work(first row, rows) over tiles of `size` rows, the last one of fewer, each on one thread: torch's
// operators inside of a parallel region take no threads of their own, and a tile has the same bits for any
// number.
template <class Work>
inline void over_tiles(int64_t rows, int64_t size, Work work) {
  const int64_t tiles = (rows + size - 1) / size;
  // At least two, of which one may be none: a single one would not be in a parallel region
  at::parallel_for(0, std::max<int64_t>(2, tiles), 1, [&](int64_t begin, int64_t end) {
    const at::AutoDispatchBelowADInplaceOrView
        below;  // the thread does not know what its caller has switched off
    for (int64_t row = begin * size; row < std::min(end * size, rows); row += size) {
      work(row, std::min(size, rows - row));
    }
  });
}

}  // namespace wanda::cpu
