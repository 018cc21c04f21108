// N:M selection with AVX2. See nm_impl.h.
#include "nm.h"

#if defined(__x86_64__)

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "convert.h"
#include "target_avx2_begin.h"

#include "nm_lanes_avx2.h"

namespace wanda::cpu {

void nm_avx2(const NmParams& params, int64_t begin, int64_t end) { nm_run<NmLanesAvx2>(params, begin, end); }

}  // namespace wanda::cpu

#include "target_end.h"

#else

namespace wanda::cpu {

void nm_avx2(const NmParams& params, int64_t begin, int64_t end) { nm_scalar(params, begin, end); }

}  // namespace wanda::cpu

#endif
