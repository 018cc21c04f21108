// As target_avx2_begin.h, which gives the rules, for AVX-512 with F, BW, CD, DQ, VL.
#if defined(__clang__)
#pragma clang attribute push(                                                                        \
    __attribute__((                                                                                  \
        target("avx2,fma,f16c,bmi,bmi2,lzcnt,popcnt,avx512f,avx512bw,avx512cd,avx512dq,avx512vl"))), \
    apply_to = function)
#elif defined(__GNUC__)
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,bmi,bmi2,lzcnt,popcnt,avx512f,avx512bw,avx512cd,avx512dq,avx512vl")
#endif
