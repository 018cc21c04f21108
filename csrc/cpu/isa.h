// The instruction sets that the CPU kernels are compiled for, and the one in use.
#pragma once

namespace wanda::cpu {

// kAvx2 means AVX2, FMA, F16C and BMI2; kAvx512 means kAvx2 and AVX-512 F, BW, CD, DQ and VL.
enum class Isa : int { kScalar, kAvx2, kAvx512 };

const char* name_of(Isa isa);

// The best set that this processor and this build have.
Isa best_isa();

// Whether this processor has what packed_avx512.cpp needs beside kAvx512: VBMI, VBMI2 and BF16.
bool has_packed_avx512();

// The set in use: best_isa() unless WANDA_KERNELS_ISA or set_isa chose another.
// Throws std::invalid_argument for an unknown name or one that this processor lacks.
Isa active_isa();
void set_isa(const char* name);

}  // namespace wanda::cpu
