// The sparse tensor cores and the roundings of simt.h. Not instrumented.
#include "../../csrc/cpu/convert.h"
#include "simt.h"

namespace simt {

uint16_t float_to_half(float value) { return wanda::cpu::fp16_of_float(value); }
uint16_t float_to_bfloat16(float value) { return wanda::cpu::bf16_of_float(value); }

// Fragments: PTX ISA, "Matrix fragments for sparse mma.m16n8k32 with .f16 and .bf16 types". What A does not
// keep is not multiplied.
void mma_sparse(bool is_bfloat16, int selector, const SparseMma& own, float (&sum)[4]) {
  SparseMma lanes[32];
  const auto share = [&](auto member) {
    uint64_t words[32];
    exchange(-1, 0xffffffffu, member(const_cast<SparseMma&>(own)), words);
    for (int i = 0; i < 32; ++i) member(lanes[i]) = static_cast<uint32_t>(words[i]);
  };
  for (int i = 0; i < 4; ++i) {
    share([i](SparseMma& lane) -> uint32_t& { return lane.a[i]; });
    share([i](SparseMma& lane) -> uint32_t& { return lane.b[i]; });
  }
  share([](SparseMma& lane) -> uint32_t& { return lane.metadata; });
  const auto element = [&](uint32_t word, int half) {
    const uint16_t bits = static_cast<uint16_t>(word >> (16 * half));
    return is_bfloat16 ? unpack<float>(static_cast<uint32_t>(bits) << 16) : half_to_float(bits);
  };
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
        const double kept = element(lanes[4 * quad + group % 4].a[group / 4 * 2 + lower], v);
        total += kept * element(lanes[4 * column + k % 8 / 2].b[k / 8], k % 2);
      }
    }
    sum[i] = static_cast<float>(total);
  }
}

}  // namespace simt
