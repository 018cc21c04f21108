// Element types of the kernels' raw pointers. No torch header: kernels also compile on their own.
#pragma once

#include <cstdint>

namespace wanda {

enum class Dtype : int { kFloat32, kBFloat16, kFloat16 };

}  // namespace wanda
