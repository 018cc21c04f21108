// wanda_kernels._C: importing it registers the operators; it tells what was built and which CPU kernels run.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/version.h>

#include <map>
#include <string>
#include <vector>

#if defined(WANDA_WITH_CUDA)
#include <cuda_runtime_api.h>
#endif

#include "cpu/isa.h"

namespace py = pybind11;
namespace cpu = wanda::cpu;

namespace {

std::map<std::string, bool> cpu_features() {
  std::map<std::string, bool> found;
#if defined(__x86_64__)
#define WANDA_FEATURE(feature) found[feature] = __builtin_cpu_supports(feature) != 0
  WANDA_FEATURE("avx2");
  WANDA_FEATURE("fma");
  WANDA_FEATURE("bmi2");
  WANDA_FEATURE("avx512f");
  WANDA_FEATURE("avx512bw");
  WANDA_FEATURE("avx512cd");
  WANDA_FEATURE("avx512dq");
  WANDA_FEATURE("avx512vl");
  WANDA_FEATURE("avx512vbmi");
  WANDA_FEATURE("avx512vbmi2");
  WANDA_FEATURE("avx512bf16");
  WANDA_FEATURE("avx512vnni");
#undef WANDA_FEATURE
#endif
  return found;
}

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (cpu::Isa isa : {cpu::Isa::kScalar, cpu::Isa::kAvx2, cpu::Isa::kAvx512}) {
    if (isa <= cpu::best_isa()) names.emplace_back(cpu::name_of(isa));
  }
  return names;
}

std::map<std::string, std::string> build_info() {
  return {{"torch", TORCH_VERSION},
#if defined(WANDA_WITH_CUDA)
          {"cuda", std::to_string(CUDART_VERSION / 1000) + "." + std::to_string(CUDART_VERSION % 1000 / 10)},
          {"nvcc", WANDA_INDEX_NVCC ? "the package index's" : "the CUDA toolkit's"},
#endif
#if defined(__clang__)
          {"compiler", "clang " __clang_version__},
#else
          {"compiler", "gcc " __VERSION__},
#endif
#if defined(_OPENMP)
          {"threads", "OpenMP"},
#else
          {"threads", "one (built without OpenMP)"},
#endif
          {"c++", std::to_string(__cplusplus)}};
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "Compiled kernels of wanda_kernels. Importing this module registers the wanda:: operators.";
  module.def("cpu_features", &cpu_features, "Processor features that the kernels ask for: name -> present.");
  module.def("available_isas", &available_isas, "Instruction sets that can be chosen here, slowest first.");
  module.def("isa", [] { return cpu::name_of(cpu::active_isa()); }, "The instruction set in use.");
  module.def(
      "set_isa", [](const std::string& name) { cpu::set_isa(name.c_str()); }, py::arg("name"),
      "Choose scalar, avx2 or avx512 for this process; ValueError where it is unknown or not there.");
  module.def("build_info", &build_info, "What the extension was built with.");
}
