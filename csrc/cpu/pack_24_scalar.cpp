// 2:4 packing without intrinsics. See pack_24_impl.h.
#include "pack_24.h"

#include "pack_24_impl.h"

namespace wanda::cpu {

int64_t pack_24_scalar(const Pack24Params& params, int64_t begin, int64_t end) {
  return pack_24_run<PackLanesScalar>(params, begin, end);
}

}  // namespace wanda::cpu
