// The kernels without an instruction set: exact on every processor. See isa.h.
#include <cstdint>
#include <cstring>
#include <new>

#include "levels_impl.h"
#include "nm_impl.h"
#include "pack_24_impl.h"
#include "packed_impl.h"
#include "product_sqnorm_impl.h"
#include "quantize_impl.h"
#include "quantized_impl.h"
#include "refine_impl.h"
#include "rows_scalar.h"
#include "sqnorm_impl.h"

namespace wanda::cpu {

Kernels scalar_kernels() {
  return {&rows_run<Scalar>,
          &nm_run<Scalar>,
          &pack_24_run<Scalar>,
          &refine_run<Scalar>,
          &levels_run,
          &sqnorm_run<Scalar>,
          &product_sqnorm_run,
          &PackedSteps<Scalar>::layout,
          &PackedSteps<Scalar>::product,
          &PackedSteps<Scalar>::unpack,
          &quantized_round,
          &quantized_product<Scalar>,
          &quantized_unpack<Scalar>,
          &quantize_run<Scalar>,
          &exact_levels_run};
}

}  // namespace wanda::cpu
