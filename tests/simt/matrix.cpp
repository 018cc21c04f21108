// The sparse tensor cores and the roundings of simt.h. Not instrumented.
#include "../../csrc/cpu/convert.h"
#include "simt.h"

namespace simt {

float half_to_float(uint16_t bits) { return wanda::cpu::float_of_fp16(bits); }
uint16_t float_to_half(float value) { return wanda::cpu::fp16_of_float(value); }
uint16_t float_to_bfloat16(float value) { return wanda::cpu::bf16_of_float(value); }

namespace {

// What every lane of the warp has.
template <class Part, class Word>
void share(const Part& own, Part (&lanes)[32], Word word) {
  uint64_t words[32];
  exchange(-1, 0xffffffffu, word(const_cast<Part&>(own)), words);
  for (int i = 0; i < 32; ++i) word(lanes[i]) = static_cast<uint32_t>(words[i]);
}

float element(bool is_bfloat16, uint32_t word, int half) {
  const uint16_t bits = static_cast<uint16_t>(word >> (16 * half));
  return is_bfloat16 ? unpack<float>(static_cast<uint32_t>(bits) << 16) : half_to_float(bits);
}

}  // namespace

// Fragments: PTX ISA, "Matrix fragments for mma.m16n8k16 with floating point type".
void mma(bool is_bfloat16, const Mma& own, float (&sum)[4]) {
  Mma lanes[32];
  for (int i = 0; i < 4; ++i) share(own, lanes, [i](Mma& lane) -> uint32_t& { return lane.a[i]; });
  for (int i = 0; i < 2; ++i) share(own, lanes, [i](Mma& lane) -> uint32_t& { return lane.b[i]; });
  const int quad = static_cast<int>(lane()) / 4, in_quad = static_cast<int>(lane()) % 4;
  for (int i = 0; i < 4; ++i) {
    const int lower = i / 2, column = 2 * in_quad + i % 2;  // lower: row quad + 8
    double total = sum[i];
    for (int k = 0; k < 16; ++k) {
      const double left = element(is_bfloat16, lanes[4 * quad + k % 8 / 2].a[k / 8 * 2 + lower], k % 2);
      total += left * element(is_bfloat16, lanes[4 * column + k % 8 / 2].b[k / 8], k % 2);
    }
    sum[i] = static_cast<float>(total);
  }
}

// Fragments: PTX ISA, "Matrix fragments for sparse mma.m16n8k32 with .f16 and .bf16 types". What A does not
// keep is not multiplied.
void mma_sparse(bool is_bfloat16, int selector, const SparseMma& own, float (&sum)[4]) {
  SparseMma lanes[32];
  for (int i = 0; i < 4; ++i) {
    share(own, lanes, [i](SparseMma& lane) -> uint32_t& { return lane.a[i]; });
    share(own, lanes, [i](SparseMma& lane) -> uint32_t& { return lane.b[i]; });
  }
  share(own, lanes, [](SparseMma& lane) -> uint32_t& { return lane.metadata; });
  const int quad = static_cast<int>(lane()) / 4, in_quad = static_cast<int>(lane()) % 4;
  for (int i = 0; i < 4; ++i) {
    const int lower = i / 2, column = 2 * in_quad + i % 2;  // lower: row quad + 8
    double total = sum[i];
    for (int group = 0; group < 8; ++group) {
      const SparseMma& holder = lanes[4 * quad + 2 * selector + group / 4];
      const uint32_t code = holder.metadata >> (16 * lower + 4 * (group % 4)) & 15;
      if ((code & 3) >= code >> 2) return fail("mma.sp: the metadata of a group do not ascend");
      for (int v = 0; v < 2; ++v) {
        const int k = 4 * group + static_cast<int>(v == 0 ? code & 3 : code >> 2);
        const double kept = element(is_bfloat16, lanes[4 * quad + group % 4].a[group / 4 * 2 + lower], v);
        total += kept * element(is_bfloat16, lanes[4 * column + k % 8 / 2].b[k / 8], k % 2);
      }
    }
    sum[i] = static_cast<float>(total);
  }
}

}  // namespace simt
