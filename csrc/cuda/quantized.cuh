// Walks the elements of four rows of a packed weight with values of 8 or 4 bits, sixteen neighbours a lane:
// for quantized_linear.cuh.
//
// Algorithm: a warp walks its share of the columns, 512 of all four rows at a time, an item: four registers
// of signed bytes a lane and row, 0 where nothing is kept. Those of 4 bits are 16 times their values: a
// byte's half in the upper half of a register's byte.
//
// Bitmap: where a lane's values begin is a sum of bits, found as in bitmap.cuh: a lane has two words of its
// row, the warp scans over them and copies their values to shared memory, 16 bytes a lane, a stage ahead.
// There a lane's values begin at any byte: three aligned words are shifted into two, in which no value is
// away from its place by more than what the four bits of its columns say. They choose one byte permutation (a
// table in the lanes, read by a shuffle), whose other operand is 0.
//
// 2:4: the four values of eight columns are an aligned word, and the table is that of the indices.
// Dense: nothing is to be found.
//
// Assumes: cols a multiple of 64; values and codes 16-byte aligned; 64 bytes behind a bitmap's last value. Of
// 4 bits the first row is even.
#pragma once

#include "block.cuh"
#include "plan_quantized.h"
#include "score.cuh"

namespace wanda::cuda {

// Sixteen neighbours of a row.
struct Elements {
  uint32_t four[4];  // signed bytes
  float scale;       // of their group
};

// From global memory, also where the pointer does not say so to the compiler.
WANDA_DEVICE uint4 ldg_16(const void* from) { return __ldg(static_cast<const uint4*>(from)); }

// A column's group of `weight` is column >> this.
WANDA_DEVICE int group_bits_of(const QuantizedWeight& weight) {
  return weight.groups == 1 ? 31 : 31 - __clz(static_cast<int>(weight.group));
}

// `tops`: 0xf0f0f0f0 in a register, or the compiler makes two instructions of it.
template <int kBits>
WANDA_DEVICE uint32_t signed_bytes(uint32_t stored, int row, uint32_t tops) {
  if constexpr (kBits == 8) return stored ^ 0x80808080u;
  return ((row % 2 == 0 ? stored << 4 : stored) & tops) ^ 0x80808080u;
}

// The selector that puts the values of four columns where they belong, of what the code's lowest four bits
// say; of a bitmap their bits in the upper half. Byte 4 is 0.
template <QuantizedForm kForm>
WANDA_DEVICE uint32_t expansion(uint32_t code) {
  uint32_t selector = 0, taken = 0;
#pragma unroll
  for (uint32_t i = 0; i < 4; ++i) {
    if constexpr (kForm == QuantizedForm::kBitmap) {
      selector |= (code >> i & 1 ? taken++ : 4) << 4 * i;
    } else {
      selector |= (i == (code & 3) ? 0u : i == (code >> 2 & 3) ? 1u : 4u) << 4 * i;
    }
  }
  return selector | taken << 19;
}

// Four rows from `first` on. Rows past the weight's last one are the last again.
template <int kBits>
struct QuantizedRows {
  int64_t first;
  int32_t last;

  WANDA_DEVICE QuantizedRows(const QuantizedWeight& weight, int64_t first)
      : first(first), last(static_cast<int32_t>(min(weight.rows - first, int64_t{kQuantizedRows})) - 1) {}
  WANDA_DEVICE uint32_t row(int r) const { return static_cast<uint32_t>(min(r, last)); }  // from `first` on
  // Of bytes.
  WANDA_DEVICE int64_t first_stored() const { return kBits == 8 ? first : first / 2; }
  WANDA_DEVICE uint32_t stored(int r) const { return kBits == 8 ? row(r) : row(r) / 2; }
};

// 2:4 and dense: words straight from memory.
template <int kBits, QuantizedForm kForm>
struct QuantizedSource {
  static constexpr bool kIsDense = kForm == QuantizedForm::kDense;
  static constexpr int kRowsOfByte = kBits == 4 && kIsDense ? 2 : 1;  // rows of 2:4 have their own places

  uint32_t table, tops;
  const uint8_t *values[kQuantizedRows / kRowsOfByte], *codes[kQuantizedRows];  // from this lane's columns on
  uint4 word[kQuantizedRows / kRowsOfByte];
  uint32_t code[kQuantizedRows];

  WANDA_DEVICE QuantizedSource(const QuantizedWeight& weight, const QuantizedRows<kBits>& rows,
                               unsigned char*, uint32_t)
      : table(kIsDense ? 0 : opaque(expansion<kForm>(lane_of(threadIdx.x)))), tops(opaque(0xf0f0f0f0u)) {
    const uint32_t lane = lane_of(threadIdx.x), cols = static_cast<uint32_t>(weight.cols);
    const uint32_t row_bytes = kIsDense ? cols : cols / 2;
    const uint8_t* const from = weight.values + rows.first_stored() * row_bytes + lane * (kIsDense ? 16 : 8);
    const uint8_t* const indices = weight.codes + (kIsDense ? 0 : rows.first * (cols / 8) + lane * 2);
#pragma unroll
    for (int r = 0; r < kQuantizedRows; ++r) {
      if (r % kRowsOfByte == 0) values[r / kRowsOfByte] = opaque(from + rows.stored(r) * row_bytes);
      if constexpr (!kIsDense) codes[r] = opaque(indices + rows.row(r) * (cols / 8));
    }
  }

  WANDA_DEVICE void begin(uint32_t) {}
  WANDA_DEVICE void start(uint32_t, bool) {}

  WANDA_DEVICE void turn(uint32_t item, bool is_there) {
    const uint32_t column = item * kQuantizedCols;
#pragma unroll
    for (int r = 0; r < kQuantizedRows; ++r) {
      if constexpr (kIsDense) {
        if (r % kRowsOfByte != 0) continue;
        word[r / kRowsOfByte] = make_uint4(0, 0, 0, 0);
        if (is_there) word[r / kRowsOfByte] = ldg_16(values[r / kRowsOfByte] + column);
      } else {
        const uint8_t* const from = values[r] + column / 2;
        const uint2 two = is_there ? __ldg(reinterpret_cast<const uint2*>(from)) : make_uint2(0, 0);
        word[r] = make_uint4(two.x, two.x >> 16, two.y, two.y >> 16);
        code[r] = is_there ? __ldg(reinterpret_cast<const uint16_t*>(codes[r] + column / 8)) : 0;
      }
    }
  }

  WANDA_DEVICE void take(int r, Elements& elements) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t own = signed_bytes<kBits>(component(word[r / kRowsOfByte], i), r, tops);
      elements.four[i] =
          kIsDense ? own : permute_bytes(own, 0, __shfl_sync(kFullMask, table, code[r] >> 4 * i));
    }
  }
};

template <int kBits>
struct QuantizedSource<kBits, QuantizedForm::kBitmap> {
  static constexpr uint32_t kLanes = kWarp / kQuantizedRows;  // of a row, two words each
  static constexpr uint32_t kHeader = kWarp * 16;             // each word, and where its values begin

  const uint2* bits;    // of this lane's row, from its words of an item on
  const uint4* values;  // from this lane's first chunk on
  uint32_t pairs;       // of words, of the row, from this lane's of an item on
  uint32_t counted;     // where the values of the item that is copied next begin
  uint2 next;           // this lane's words of that item
  uint32_t in_row, table, tops, shift, below;
  uint32_t header, row_at,
      words_at;  // in a stage: what this lane writes of words and values, and reads of words
  SharedAddress ring, ring_end, to, stage;  // of stages: copied to next, walked

  // `memory`: of this warp's stages.
  WANDA_DEVICE QuantizedSource(const QuantizedWeight& weight, const QuantizedRows<kBits>& rows,
                               unsigned char* memory, uint32_t ring_bytes)
      : in_row(opaque(lane_of(threadIdx.x) % kLanes)),
        ring(shared_address(memory)),
        ring_end(ring + ring_bytes) {
    const uint32_t lane = lane_of(threadIdx.x);
    const int r = static_cast<int>(lane / kLanes);
    const int64_t row = rows.first + rows.row(r);
    bits = opaque(reinterpret_cast<const uint2*>(weight.codes) + row * (weight.cols / 64) + in_row);
    values = opaque(reinterpret_cast<const uint4*>(weight.values) + in_row);
    pairs = static_cast<uint32_t>(weight.cols / 64) - in_row;
    counted = static_cast<uint32_t>(__ldg(weight.starts + rows.first_stored() + rows.stored(r)));
    table = opaque(expansion<QuantizedForm::kBitmap>(lane));
    tops = opaque(0xf0f0f0f0u);
    header = opaque(lane * 16);
    row_at = opaque(kHeader + lane / kLanes * kQuantizedRowBytes);
    words_at = opaque(lane / 2 * 8);
    shift = opaque(16 * (lane % 2));
    below = opaque((1u << 16 * (lane % 2)) - 1);
    to = ring;
    stage = ring_end - kQuantizedStageBytes;  // the one before the first
  }

  WANDA_DEVICE uint2 words_of(uint32_t item) const {
    return static_cast<int32_t>(item * kLanes) < static_cast<int32_t>(pairs) ? __ldg(bits + item * kLanes)
                                                                             : make_uint2(0, 0);
  }

  WANDA_DEVICE static uint32_t kept(uint2 words) { return __popc(words.x) + __popc(words.y); }

  WANDA_DEVICE SharedAddress after(SharedAddress one) const {
    return one + kQuantizedStageBytes == ring_end ? ring : one + kQuantizedStageBytes;
  }

  // Starts to copy the values of an item with this lane's `words`.
  WANDA_DEVICE void copy(uint2 words) {
    const uint32_t lane = lane_of(threadIdx.x), own = kept(words);
    uint32_t through = own;
#pragma unroll
    for (uint32_t step = 1; step < kLanes; step *= 2) {
      const uint32_t other = __shfl_up_sync(kFullMask, through, step);
      if (in_row >= step) through += other;
    }
    const uint32_t count = __shfl_sync(kFullMask, through, lane | (kLanes - 1));
    const SharedAddress row = to + row_at;
    const uint32_t skipped = counted % 16, first = row + skipped + through - own;
    store_shared(to + header, words.x, first);
    store_shared(to + header + 8, words.y, first + __popc(words.x));
    const uint4* const from = opaque(values + counted / 16);
    const int32_t chunks = (skipped + count + 11 + 15) / 16 - in_row;  // a lane reads 11 bytes past its place
#pragma unroll
    for (int i = 0; i * kLanes * 16 < kQuantizedRowBytes; ++i) {
      if (static_cast<int32_t>(i * kLanes) < chunks) {
        copy_async_16(row + in_row * 16 + i * kLanes * 16, from + i * kLanes);
      }
    }
    counted += count;
    to = after(to);
  }

  // Goes on to item `first`, in front of which nothing has been counted yet.
  WANDA_DEVICE void begin(uint32_t first) {
    next = words_of(first);
    uint32_t count = 0;
#pragma unroll 4
    for (uint32_t i = 0; i < first * kLanes; i += kLanes) count += kept(__ldg(bits + i));
#pragma unroll
    for (uint32_t step = 1; step < kLanes; step *= 2) count += __shfl_xor_sync(kFullMask, count, step);
    counted += count;
  }

  // Starts to copy an item, if there is one.
  WANDA_DEVICE void start(uint32_t item, bool is_there) {
    __syncwarp();  // nobody reads that stage any more
    if (is_there) {
      copy(next);
      next = words_of(item + 1);
    }
    copy_async_commit();
  }

  // Waits for the item that was started before the last one.
  WANDA_DEVICE void turn(uint32_t, bool) {
    copy_async_wait<1>();
    __syncwarp();  // all lanes' parts of this stage are there
    stage = after(stage);
  }

  WANDA_DEVICE void take(int r, Elements& elements) const {
    const uint2 own = load_shared<uint2>(stage + words_at + r * 2 * kLanes * 8);
    const uint32_t bits = own.x >> shift;
    SharedAddress at = own.y + __popc(own.x & below);
#pragma unroll
    for (int i = 0; i < 4; i += 2) {
      if (i == 2) at += __popc(bits & 255);
      const SharedAddress word = at & ~3u;
      const uint32_t a = load_shared<uint32_t>(word), b = load_shared<uint32_t>(word + 4);
      const uint32_t low = signed_bytes<kBits>(__funnelshift_r(a, b, 8 * at), r, tops);
      const uint32_t c = load_shared<uint32_t>(word + 8);
      const uint32_t high = signed_bytes<kBits>(__funnelshift_r(b, c, 8 * at), r, tops);
      const uint32_t selector = __shfl_sync(kFullMask, table, bits >> 4 * i);
      elements.four[i] = permute_bytes(low, 0, selector);
      elements.four[i + 1] = permute_bytes(__funnelshift_rc(low, high, selector >> 16), 0,
                                           __shfl_sync(kFullMask, table, bits >> (4 * i + 4)));
    }
  }
};

// visit(column, elements): sixteen columns a lane of each of four rows from `first_row` on, those of the
// block's warps together all of the row's. kScaled: with their scales. `memory`: of the warps' stages.
template <int kBits, QuantizedForm kForm, bool kScaled, class Visit>
WANDA_DEVICE void walk_quantized(const QuantizedWeight& weight, int64_t first_row, unsigned char* memory,
                                 const QuantizedPlan& plan, Visit visit) {
  // The same register for all lanes, as the compiler would not know.
  const uint32_t warp = __shfl_sync(kFullMask, threadIdx.x / kWarp, 0);
  const uint32_t cols = static_cast<uint32_t>(weight.cols), begin = warp * plan.share;
  const uint32_t end = min(begin + plan.share, (cols + kQuantizedCols - 1) / kQuantizedCols);
  if (begin >= end) return;
  const QuantizedRows<kBits> rows(weight, first_row);
  QuantizedSource<kBits, kForm> source(weight, rows, memory + warp * plan.ring_bytes, plan.ring_bytes);
  const int group_bits = group_bits_of(weight);
  const uint32_t groups = static_cast<uint32_t>(weight.groups);
  const uint16_t* const first_scales = weight.scales + first_row * groups;
  const uint16_t* scales[kQuantizedRows];
#pragma unroll
  for (int r = 0; r < kQuantizedRows; ++r) {
    scales[r] = kScaled ? opaque(first_scales + rows.row(r) * groups) : nullptr;
  }
  source.begin(begin);
  uint32_t column = begin * kQuantizedCols + 16 * lane_of(threadIdx.x);
#pragma unroll 1
  for (uint32_t next = begin; next <= end; ++next) {
    source.start(next, next < end);
    if (next == begin) continue;
    const bool is_there = column < cols;
    uint32_t scale[kQuantizedRows] = {};
    if (kScaled && is_there) {
#pragma unroll
      for (int r = 0; r < kQuantizedRows; ++r) scale[r] = __ldg(scales[r] + (column >> group_bits));
    }
    source.turn(next - 1, is_there);
    Elements elements[kQuantizedRows];
#pragma unroll
    for (int r = 0; r < kQuantizedRows; ++r) {
      source.take(r, elements[r]);
      elements[r].scale = __uint_as_float(scale[r] << 16);
    }
    if (is_there) visit(column, elements);
    column += kQuantizedCols;
  }
}

}  // namespace wanda::cuda
