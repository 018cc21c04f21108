// Launchers of products with packed weights of 8 or 4 bits, of rounding x for them and of unpacking.
#include "launchers.h"
#include "quantized_linear.cuh"

namespace wanda::cuda {
namespace {

// f(Constant<bits>, Constant<form>).
template <class F>
int by_form(const QuantizedWeight& weight, F f) {
  const auto with = [&](auto form) {
    return weight.bits == 8 ? f(Constant<8>{}, form) : f(Constant<4>{}, form);
  };
  switch (form_of(weight)) {
    case QuantizedForm::kBitmap:
      return with(Constant<QuantizedForm::kBitmap>{});
    case QuantizedForm::kSparse24:
      return with(Constant<QuantizedForm::kSparse24>{});
    default:
      return with(Constant<QuantizedForm::kDense>{});
  }
}

template <int kBits, QuantizedForm kForm, bool kGrouped>
int launch_room(const QuantizedLinearParams& params, const QuantizedPlan& plan, CUstream_st* stream) {
  const Shape shape{divide_up(params.weight.rows / params.experts, kQuantizedRows), plan.threads,
                    quantized_shared_bytes(plan), params.experts};
  const auto kernel = plan.room == 1   ? &quantized_linear_kernel<kBits, kForm, kGrouped, 1>
                      : plan.room == 4 ? &quantized_linear_kernel<kBits, kForm, kGrouped, 4>
                                       : &quantized_linear_kernel<kBits, kForm, kGrouped, 8>;
  return launch(kernel, shape, stream, params, plan);
}

}  // namespace

int launch_round(const RoundParams& params, CUstream_st* stream) {
  const Shape shape{params.tokens * params.groups, whole_warps(params.group, kRoundThreads),
                    kRoundThreads / kWarp * 4};
  return launch(&round_kernel, shape, stream, params);
}

int launch_quantized_linear(const QuantizedLinearParams& params, const QuantizedPlan& plan,
                            CUstream_st* stream) {
  return by_form(params.weight, [&](auto bits, auto form) {
    constexpr int kBits = decltype(bits)::value;
    constexpr QuantizedForm kForm = decltype(form)::value;
    if constexpr (kBits == 8) {
      if (params.weight.groups == 1) return launch_room<kBits, kForm, false>(params, plan, stream);
    }
    return launch_room<kBits, kForm, true>(params, plan, stream);
  });
}

int launch_unpack_quantized(const QuantizedWeight& weight, void* dense, Dtype dtype,
                            const QuantizedPlan& plan, CUstream_st* stream) {
  return by_form(weight, [&](auto bits, auto form) {
    constexpr QuantizedForm kForm = decltype(form)::value;
    const Shape shape{divide_up(weight.rows, kQuantizedRows), plan.threads, quantized_shared_bytes(plan)};
    return launch(&unpack_quantized_kernel<decltype(bits)::value, kForm>, shape, stream, weight, dense, dtype,
                  plan);
  });
}

}  // namespace wanda::cuda
