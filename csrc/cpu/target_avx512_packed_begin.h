// As target_avx512_begin.h, with VBMI, VBMI2 and BF16 too, for packed_avx512.cpp.
#if defined(__clang__)
#pragma clang attribute push(                                                                                \
    __attribute__((target("avx2,fma,f16c,bmi,bmi2,lzcnt,popcnt,avx512f,avx512bw,avx512cd,avx512dq,avx512vl," \
                          "avx512vbmi,avx512vbmi2,avx512bf16"))),                                            \
    apply_to = function)
#elif defined(__GNUC__)
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,bmi,bmi2,lzcnt,popcnt,avx512f,avx512bw,avx512cd,avx512dq,avx512vl")
#pragma GCC target("avx512vbmi,avx512vbmi2,avx512bf16")
#endif
