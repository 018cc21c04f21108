// How rows are split over threads.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <cstdint>

namespace wanda::cpu {

// work(begin, end) over rows of `cols` elements. A task below some tens of thousands of elements costs more
// to hand to a thread than to run.
template <class Work>
inline void over_rows(int64_t rows, int64_t cols, Work work) {
  if (cols > 0) at::parallel_for(0, rows, std::max<int64_t>(1, 32768 / cols), work);
}

}  // namespace wanda::cpu
