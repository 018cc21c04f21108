// How the CPU launchers split work over threads.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>

#include "isa.h"

namespace wanda::cpu {

// work(begin, end) over rows of `cols` elements. A task below some tens of thousands of elements costs more
// to hand to a thread than to run.
template <class Work>
void over_rows(int64_t rows, int64_t cols, Work work) {
  at::parallel_for(0, rows, std::max<int64_t>(1, 32768 / std::max<int64_t>(1, cols)), work);
}

// work(sequence, first column, last column + 1): by sequences, or by columns where there are few or where all
// add to one row. Threads part a row at cache lines.
template <class Work>
void over_sequences(int64_t sequences, int64_t cols, bool is_shared, Work work) {
  constexpr int64_t kColumnStep = 64;
  if (!is_shared && sequences >= at::get_num_threads()) {
    at::parallel_for(0, sequences, 1, [&](int64_t begin, int64_t end) {
      for (int64_t sequence = begin; sequence < end; ++sequence) work(sequence, int64_t{0}, cols);
    });
    return;
  }
  at::parallel_for(0, (cols + kColumnStep - 1) / kColumnStep, 1, [&](int64_t first, int64_t last) {
    const int64_t end = std::min(last * kColumnStep, cols);
    for (int64_t sequence = 0; sequence < sequences; ++sequence) work(sequence, first * kColumnStep, end);
  });
}

}  // namespace wanda::cpu
