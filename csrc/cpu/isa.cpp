#include "isa.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace wanda::cpu {
namespace {

Isa parse(const std::string& name) {
  for (Isa isa : {Isa::kScalar, Isa::kAvx2, Isa::kAvx512}) {
    if (name != name_of(isa)) continue;
    if (isa > best_isa()) {
      throw std::invalid_argument("instruction set " + name +
                                  " is not there: this processor and build have " + name_of(best_isa()) +
                                  " at most");
    }
    return isa;
  }
  throw std::invalid_argument("instruction set must be scalar, avx2 or avx512, got '" + name + "'");
}

Isa& chosen() {
  static Isa isa = [] {
    const char* name = std::getenv("WANDA_KERNELS_ISA");
    return name != nullptr && *name != '\0' ? parse(name) : best_isa();
  }();
  return isa;
}

}  // namespace

const char* name_of(Isa isa) {
  switch (isa) {
    case Isa::kScalar:
      return "scalar";
    case Isa::kAvx2:
      return "avx2";
    case Isa::kAvx512:
      return "avx512";
  }
  return "unknown";
}

Isa best_isa() {
#if defined(__x86_64__)
  static const Isa best = [] {
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                      __builtin_cpu_supports("f16c") && __builtin_cpu_supports("bmi") &&
                      __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("lzcnt") &&
                      __builtin_cpu_supports("popcnt");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                        __builtin_cpu_supports("avx512vl");
    return avx512 ? Isa::kAvx512 : avx2 ? Isa::kAvx2 : Isa::kScalar;
  }();
  return best;
#else
  return Isa::kScalar;
#endif
}

const Kernels& kernels() {
  static const Kernels scalar = scalar_kernels();
#if defined(__x86_64__)
  if (active_isa() == Isa::kAvx512) {
    static const Kernels avx512 = avx512_kernels();
    return avx512;
  }
  if (active_isa() == Isa::kAvx2) {
    static const Kernels avx2 = avx2_kernels();
    return avx2;
  }
#endif
  return scalar;
}

Isa active_isa() { return chosen(); }

void set_isa(const char* name) { chosen() = parse(name); }

}  // namespace wanda::cpu
