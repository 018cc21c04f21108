// N:M selection without intrinsics: exact on every processor. See nm_impl.h.
#include "nm.h"

#include "nm_impl.h"

namespace wanda::cpu {

void nm_scalar(const NmParams& params, int64_t begin, int64_t end) {
  nm_run<NmLanesScalar>(params, begin, end);
}

}  // namespace wanda::cpu
