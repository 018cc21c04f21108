// Walks the elements of rows of a bitmap, four neighbours a thread: for bitmap_linear.cuh and
// unpack_packed.cuh.
//
// Algorithm: a warp walks its share of the columns of kRows rows, 1024 elements at a time: a word of 32 bits
// a lane. Where a word's values begin is a sum of bits: the warp itself counts those of the row before its
// share (4096 columns are 512 bytes), then goes on from item to item, and scans over the words of one. So an
// item's values, a range in each row, are copied to shared memory an item ahead, 16 bytes a lane from
// the aligned address at or below where they begin, and nobody waits for other warps. Then in steps of 128
// columns, four a lane, values are read from there in the order of memory: without bank conflicts.
//
// Assumes: values and codes 16-byte aligned; kPackedPadding values behind the last.
#pragma once

#include "block.cuh"
#include "score.cuh"

namespace wanda::cuda {

// Four neighbouring elements: which of them are kept (the lowest bits of `bits`; those above are others'),
// and where the first that is has its value. One value more than there are can be read behind the last.
struct Quad {
  uint32_t bits;
  SharedAddress values;
};

// What is kept of four elements, +0 for the others.
template <class Bits>
WANDA_DEVICE void quad_values(const Quad& quad, Bits (&element)[4]) {
  SharedAddress next = quad.values;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    element[i] = 0;
    if (quad.bits >> i & 1) {
      element[i] = load_shared<Bits>(next);
      next += sizeof(Bits);
    }
  }
}

// A warp's walk. All lanes of a warp call and visit together. What a lane adds to a stage's address, and
// where its words and values are read from, is worked out once and kept.
template <Dtype kDtype, int kRows>
struct BitmapWalk {
  static constexpr uint32_t kSize = sizeof(typename Element<kDtype>::Bits), kInChunk = 16 / kSize;
  static constexpr uint32_t kLanes = kWarp / kRows;           // of a row
  static constexpr uint32_t kCols = kLanes * kWarp;           // of an item
  static constexpr uint32_t kHeader = kWarp * sizeof(uint2);  // each lane's word, and where its values begin
  static constexpr uint32_t kRowBytes = bitmap_row_bytes(kDtype, kRows);
  static constexpr uint32_t kStageBytes = bitmap_stage_bytes(kDtype, kRows);

  const uint32_t* bits;  // of this lane's row, from its word of an item on
  const uint4* values;   // from this lane's first chunk on
  uint32_t words;        // of the row, from this lane's of an item on
  uint32_t begin;        // where the values of the item that is copied next begin
  uint32_t in_row;
  SharedAddress ring, ring_end;  // of stages

  // `memory`: `stages` of this warp. Rows past the weight's last are its last again.
  WANDA_DEVICE BitmapWalk(const PackedWeight& weight, int64_t first_row, unsigned char* memory, int stages)
      : in_row(opaque(lane_of(threadIdx.x) % kLanes)),
        ring(shared_address(memory)),
        ring_end(ring + stages * kStageBytes) {
    const int64_t row = min(first_row + lane_of(threadIdx.x) / static_cast<int>(kLanes), weight.rows - 1);
    bits = opaque(reinterpret_cast<const uint32_t*>(weight.codes) + row * (weight.cols / kWarp) + in_row);
    values = opaque(static_cast<const uint4*>(weight.values) + in_row);
    words = static_cast<uint32_t>(weight.cols / kWarp) - in_row;
    begin = static_cast<uint32_t>(__ldg(weight.starts + row));
  }

  WANDA_DEVICE uint32_t word_of(uint32_t item) const {
    return static_cast<int32_t>(item * kLanes) < static_cast<int32_t>(words) ? __ldg(bits + item * kLanes)
                                                                             : 0;
  }

  // Goes on to an item, in front of which nothing has been counted yet.
  WANDA_DEVICE void count_before(uint32_t item) {
    uint32_t count = 0;
#pragma unroll 4
    for (uint32_t i = 0; i + in_row < item * (kLanes / 2); i += kLanes) {
      const uint2 two = *reinterpret_cast<const uint2*>(bits + in_row + 2 * i);
      count += __popc(two.x) + __popc(two.y);
    }
#pragma unroll
    for (uint32_t step = 1; step < kLanes; step *= 2) count += __shfl_xor_sync(kFullMask, count, step);
    begin += count;
  }

  // Starts to copy the values of the item with this lane's `word`.
  WANDA_DEVICE void copy(uint32_t word, SharedAddress stage) {
    const uint32_t lane = lane_of(threadIdx.x), own = __popc(word);
    uint32_t through = own;
#pragma unroll
    for (uint32_t step = 1; step < kLanes; step *= 2) {
      const uint32_t other = __shfl_up_sync(kFullMask, through, step);
      if (in_row >= step) through += other;
    }
    const uint32_t count = __shfl_sync(kFullMask, through, lane | (kLanes - 1));
    const SharedAddress row = stage + kHeader + lane / kLanes * kRowBytes;
    const uint32_t skipped = begin % kInChunk;
    store_shared(stage + lane * sizeof(uint2), word, row + (skipped + through - own) * kSize);
    const uint4* const from = opaque(values + begin / kInChunk);
    const int32_t chunks = (skipped + count + 2 + kInChunk - 1) / kInChunk - in_row;
#pragma unroll
    for (int i = 0; i * kLanes * 16 < kRowBytes; ++i) {
      if (static_cast<int32_t>(i * kLanes) < chunks) {
        copy_async_16(row + in_row * 16 + i * kLanes * 16, from + i * kLanes);
      }
    }
    begin += count;
  }

  // visit(column, offset, quads): this lane's columns from `column` + `offset` on in each of the rows, of the
  // items from `first` to before `end`. Past the row's end nothing is kept.
  template <class Visit>
  WANDA_DEVICE void run(uint32_t first, uint32_t end, Visit visit) {
    const uint32_t lane = lane_of(threadIdx.x), shift = opaque(4 * lane % kWarp);
    const uint32_t below = opaque((1u << 4 * lane % kWarp) - 1);
    uint32_t word = word_of(first), next = word_of(first + 1);
    count_before(first);
    copy(word, ring);
    copy_async_commit();
    SharedAddress stage = ring;
#pragma unroll 1
    for (uint32_t item = first; item < end; ++item) {
      const SharedAddress other = stage + kStageBytes == ring_end ? ring : stage + kStageBytes;
      word = next;
      next = word_of(item + 2);
      __syncwarp();  // nobody reads the other stage any more
      if (item + 1 < end) copy(word, other);
      copy_async_commit();
      copy_async_wait<1>();
      __syncwarp();  // all lanes' parts of this stage are there
      const SharedAddress words_of_lane = stage + lane / 8 * sizeof(uint2);
#pragma unroll
      for (uint32_t step = 0; step < kCols / 128; ++step) {
        Quad quads[kRows];
#pragma unroll
        for (uint32_t r = 0; r < kRows; ++r) {
          const uint2 own = load_shared<uint2>(words_of_lane + (r * kLanes + 4 * step) * sizeof(uint2));
          quads[r] = {own.x >> shift, own.y + __popc(own.x & below) * kSize};
        }
        visit(item * kCols + 4 * lane, 128 * step, quads);
      }
      stage = other;
    }
  }
};

// run() for the block's warps, each with its share of the columns. `memory`: bitmap_shared_bytes.
template <Dtype kDtype, int kRows, class Visit>
WANDA_DEVICE void walk_bitmap(const PackedWeight& weight, int64_t first_row, unsigned char* memory,
                              int stages, Visit visit) {
  using Walk = BitmapWalk<kDtype, kRows>;
  // The same register for all lanes, as the compiler would not know.
  const uint32_t warp = __shfl_sync(kFullMask, threadIdx.x / kWarp, 0), warps = blockDim.x / kWarp;
  Walk walk(weight, first_row, memory + warp * stages * Walk::kStageBytes, stages);
  const uint32_t items = (static_cast<uint32_t>(weight.cols) + Walk::kCols - 1) / Walk::kCols;
  const uint32_t share = (items + warps - 1) / warps;
  if (warp * share < items) walk.run(warp * share, min(warp * share + share, items), visit);
}

}  // namespace wanda::cuda
