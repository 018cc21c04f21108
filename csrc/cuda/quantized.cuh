// Walks the elements of four rows of a packed weight with values of 8 or 4 bits, eight neighbours a lane: for
// quantized_linear.cuh.
//
// Algorithm: a warp walks its share of the columns, 512 of all four rows at a time. Eight columns of a row are
// two registers of signed bytes, 0 where nothing is kept; of 4 bits each is 16 times its value, the half of
// its byte where it is, so that both halves cost the same.
//
// Bitmap: where a lane's values begin is a sum of bits, found as in bitmap.cuh: a lane has two words of its
// row, the warp scans over them and copies their values to shared memory, 16 bytes a lane, a stage ahead. There
// a lane's values begin at any byte: three aligned words are shifted into two, in which no value is away from
// its place by more than what the four bits of its columns say. They choose one byte permutation (a table in
// the lanes, read by a shuffle), whose other operand is 0.
//
// 2:4: the four values of eight columns are an aligned word, and the table is that of the indices.
// Dense: nothing is to be found.
//
// Assumes: cols a multiple of 64; values and codes 16-byte aligned; 64 bytes behind a bitmap's last value. Of 4
// bits the first row is even.
#pragma once

#include "block.cuh"
#include "score.cuh"

namespace wanda::cuda {

struct Octet {
  uint32_t first, second;  // eight signed bytes
  float scale;             // the group's
};

// A column's group of `weight` is column >> this.
WANDA_DEVICE int group_bits_of(const QuantizedWeight& weight) {
  return weight.groups == 1 ? 31 : 31 - __clz(static_cast<int>(weight.group));
}

template <int kBits>
WANDA_DEVICE uint32_t signed_bytes(uint32_t stored, int row) {
  if constexpr (kBits == 8) return stored ^ 0x80808080u;
  return ((row % 2 == 0 ? stored << 4 : stored) ^ 0x80808080u) & 0xf0f0f0f0u;
}

// The selector that puts the values of four columns where they belong, of what the code's lowest four bits say;
// of a bitmap their bits in the upper half. Byte 4 is 0.
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

// Where a weight's bytes are, for four rows from `first` on. Rows past the last one are the last again.
template <int kBits>
struct QuantizedRows {
  int64_t first;
  int32_t last;

  WANDA_DEVICE QuantizedRows(const QuantizedWeight& weight, int64_t first)
      : first(first), last(static_cast<int32_t>(min(weight.rows - 1 - first, int64_t{kQuantizedRows}))) {}
  WANDA_DEVICE uint32_t row(int r) const { return static_cast<uint32_t>(min(r, last)); }
  WANDA_DEVICE int64_t stored(int r) const { return kBits == 8 ? first + row(r) : (first + row(r)) / 2; }
};

// 2:4 and dense: words straight from memory.
template <int kBits, QuantizedForm kForm>
struct QuantizedSource {
  static constexpr bool kIsDense = kForm == QuantizedForm::kDense;
  static constexpr int kSteps = kQuantizedCols / 256;
  static constexpr int kStored = kBits == 8 || !kIsDense ? kQuantizedRows : kQuantizedRows / 2;

  uint32_t cols, table;
  const uint8_t *values, *codes;  // from this lane's columns of the first row on
  uint32_t value_row[kQuantizedRows], code_row[kQuantizedRows];
  uint2 word[kSteps][kStored];
  uint32_t code[kSteps][kQuantizedRows];

  WANDA_DEVICE QuantizedSource(const QuantizedWeight& weight, const QuantizedRows<kBits>& rows,
                               unsigned char*, int)
      : cols(static_cast<uint32_t>(weight.cols)) {
    const uint32_t lane = lane_of(threadIdx.x), row_bytes = kIsDense ? cols : cols / 2;
    values = weight.values + rows.stored(0) * row_bytes + lane * (kIsDense ? 8 : 4);
    if constexpr (!kIsDense) codes = weight.codes + rows.first * (cols / 8) + lane;
    table = opaque(expansion<kForm>(lane));
#pragma unroll
    for (int r = 0; r < kQuantizedRows; ++r) {
      value_row[r] = opaque(static_cast<uint32_t>(rows.stored(r) - rows.stored(0)) * row_bytes);
      code_row[r] = opaque(rows.row(r) * (cols / 8));
    }
  }

  WANDA_DEVICE void begin(uint32_t) {}

  WANDA_DEVICE void turn(uint32_t item, uint32_t) {
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      const uint32_t column = item * kQuantizedCols + step * 256;
      const bool is_there = column + 8 * lane_of(threadIdx.x) < cols;
#pragma unroll
      for (int r = 0; r < kQuantizedRows; ++r) {
        const uint8_t* const from = values + value_row[r] + column / (kIsDense ? 1 : 2);
        if constexpr (kIsDense) {
          const int i = kBits == 8 ? r : r / 2;
          if (kBits == 4 && r % 2 == 1) continue;  // the other half of its bytes
          word[step][i] = is_there ? __ldg(reinterpret_cast<const uint2*>(from)) : make_uint2(0, 0);
        } else {
          word[step][r].x = is_there ? __ldg(reinterpret_cast<const uint32_t*>(from)) : 0;
          code[step][r] = is_there ? __ldg(codes + code_row[r] + column / 8) : 0;
        }
      }
    }
  }

  WANDA_DEVICE void take(int step, int r, Octet& octet) const {
    if constexpr (kIsDense) {
      const uint2 both = word[step][kBits == 8 ? r : r / 2];
      octet.first = signed_bytes<kBits>(both.x, r);
      octet.second = signed_bytes<kBits>(both.y, r);
    } else {
      const uint32_t kept = signed_bytes<kBits>(word[step][r].x, r);
      octet.first = permute_bytes(kept, 0, __shfl_sync(kFullMask, table, code[step][r]));
      octet.second = permute_bytes(kept >> 16, 0, __shfl_sync(kFullMask, table, code[step][r] >> 4));
    }
  }
};

template <int kBits>
struct QuantizedSource<kBits, QuantizedForm::kBitmap> {
  static constexpr int kSteps = kQuantizedCols / 256;
  static constexpr uint32_t kLanes = kWarp / kQuantizedRows;  // of a row, two words each
  static constexpr uint32_t kHeader = kWarp * 16;  // each word, and where its values begin

  const uint2* bits;    // of this lane's row, from its words of an item on
  const uint4* values;  // from this lane's first chunk on
  uint32_t pairs;       // of words, of the row, from this lane's of an item on
  uint32_t counted;     // where the values of the item that is copied next begin
  uint32_t in_row, table, shift, below;
  uint2 next;
  SharedAddress ring, ring_end, to, stage;  // of stages: copied to next, walked

  // `memory`: `stages` of this warp.
  WANDA_DEVICE QuantizedSource(const QuantizedWeight& weight, const QuantizedRows<kBits>& rows,
                               unsigned char* memory, int stages)
      : in_row(opaque(lane_of(threadIdx.x) % kLanes)),
        ring(shared_address(memory)),
        ring_end(ring + stages * kQuantizedStageBytes) {
    const uint32_t lane = lane_of(threadIdx.x);
    const int r = static_cast<int>(lane / kLanes);
    const int64_t row = rows.first + rows.row(r);
    bits = opaque(reinterpret_cast<const uint2*>(weight.codes) + row * (weight.cols / 64) + in_row);
    values = opaque(reinterpret_cast<const uint4*>(weight.values) + in_row);
    pairs = static_cast<uint32_t>(weight.cols / 64) - in_row;
    counted = static_cast<uint32_t>(__ldg(weight.starts + rows.stored(r)));
    table = opaque(expansion<QuantizedForm::kBitmap>(lane));
    shift = opaque(8 * (lane % 4));
    below = opaque((1u << 8 * (lane % 4)) - 1);
    to = stage = ring;
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
    const SharedAddress row = to + kHeader + lane / kLanes * kQuantizedRowBytes;
    const uint32_t skipped = counted % 16, first = row + skipped + through - own;
    store_shared(to + lane * 16, words.x, first);
    store_shared(to + lane * 16 + 8, words.y, first + __popc(words.x));
    const uint4* const from = opaque(values + counted / 16);
    const int32_t chunks = (skipped + count + 11 + 15) / 16 - in_row;  // a lane reads 11 bytes past its place
#pragma unroll
    for (int i = 0; i * kLanes * 16 < kQuantizedRowBytes; ++i) {
      if (static_cast<int32_t>(i * kLanes) < chunks) {
        copy_async_16(row + in_row * 16 + i * kLanes * 16, from + i * kLanes);
      }
    }
    copy_async_commit();
    counted += count;
    to = after(to);
  }

  // Goes on to item `first`, in front of which nothing has been counted yet.
  WANDA_DEVICE void begin(uint32_t first) {
    const uint2 words = words_of(first);
    next = words_of(first + 1);
    uint32_t count = 0;
#pragma unroll 4
    for (uint32_t i = 0; i < first * kLanes; i += kLanes) count += kept(__ldg(bits + i));
#pragma unroll
    for (uint32_t step = 1; step < kLanes; step *= 2) count += __shfl_xor_sync(kFullMask, count, step);
    counted += count;
    copy(words);
  }

  // Copies the item after this one, and waits for this one.
  WANDA_DEVICE void turn(uint32_t item, uint32_t end) {
    stage = after(to);
    __syncwarp();  // nobody reads the other stage any more
    if (item + 1 < end) {
      copy(next);
      next = words_of(item + 2);
      copy_async_wait<1>();
    } else {
      copy_async_wait<0>();
    }
    __syncwarp();  // all lanes' parts of this stage are there
  }

  WANDA_DEVICE void take(int step, int r, Octet& octet) const {
    const uint2 own = load_shared<uint2>(stage + lane_of(threadIdx.x) / 4 * 8 + (r * 2 * kLanes + 8 * step) * 8);
    const uint32_t four = own.x >> shift;
    const SharedAddress at = own.y + __popc(own.x & below), word = at & ~3u;
    const uint32_t middle = load_shared<uint32_t>(word + 4);
    const uint32_t low = signed_bytes<kBits>(__funnelshift_r(load_shared<uint32_t>(word), middle, 8 * at), r);
    const uint32_t high = signed_bytes<kBits>(__funnelshift_r(middle, load_shared<uint32_t>(word + 8), 8 * at), r);
    const uint32_t selector = __shfl_sync(kFullMask, table, four);
    octet.first = permute_bytes(low, 0, selector);
    octet.second = permute_bytes(__funnelshift_rc(low, high, selector >> 16), 0,
                                 __shfl_sync(kFullMask, table, four >> 4));
  }
};

// visit(column, octets) with eight columns a lane of each of four rows from `first_row` on, those of the block's
// warps together all of the row's. kScaled: with their scales. `memory`: quantized_shared_bytes.
template <int kBits, QuantizedForm kForm, bool kScaled, class Visit>
WANDA_DEVICE void walk_quantized(const QuantizedWeight& weight, int64_t first_row, unsigned char* memory,
                                 int stages, Visit visit) {
  using Source = QuantizedSource<kBits, kForm>;
  // The same register for all lanes, as the compiler would not know.
  const uint32_t warp = __shfl_sync(kFullMask, threadIdx.x / kWarp, 0), warps = blockDim.x / kWarp;
  const uint32_t cols = static_cast<uint32_t>(weight.cols), items = (cols + kQuantizedCols - 1) / kQuantizedCols;
  const uint32_t share = (items + warps - 1) / warps, begin = warp * share, end = min(begin + share, items);
  if (begin >= end) return;
  const QuantizedRows<kBits> rows(weight, first_row);
  Source source(weight, rows, memory + warp * stages * kQuantizedStageBytes, stages);
  const uint32_t lane = lane_of(threadIdx.x), groups = static_cast<uint32_t>(weight.groups);
  const int group_bits = group_bits_of(weight);
  const uint16_t* const scales = weight.scales + first_row * groups;
  source.begin(begin);
#pragma unroll 1
  for (uint32_t item = begin; item < end; ++item) {
    const uint32_t first = item * kQuantizedCols + 8 * lane;
    uint32_t scale[Source::kSteps][kQuantizedRows] = {};
#pragma unroll
    for (int step = 0; step < Source::kSteps; ++step) {
#pragma unroll
      for (int r = 0; r < kQuantizedRows; ++r) {
        if (!kScaled || first + 256 * step >= cols) continue;
        scale[step][r] = __ldg(scales + rows.row(r) * groups + (first + 256 * step >> group_bits));
      }
    }
    source.turn(item, end);
#pragma unroll
    for (int step = 0; step < Source::kSteps; ++step) {
      Octet octets[kQuantizedRows];
#pragma unroll
      for (int r = 0; r < kQuantizedRows; ++r) {
        source.take(step, r, octets[r]);
        octets[r].scale = __uint_as_float(scale[step][r] << 16);
      }
      if (first + 256 * step < cols) visit(first + 256 * step, octets);
    }
  }
}

}  // namespace wanda::cuda
