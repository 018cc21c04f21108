// Compile what follows, up to target_end.h, for AVX2 (plus FMA, F16C, BMI). No include guard: each begin
// needs its own end. The whole extension is built with one set of plain flags, so a source file picks its
// instruction set here. Rules:
// - include every standard header and <immintrin.h> BEFORE this file;
// - put all that follows, bar the entry point, into an anonymous namespace, and use no standard template in
// it:
//   an inline function compiled here and chosen by the linker for the whole program would crash processors
//   without these instructions.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,bmi,bmi2,lzcnt,popcnt"))), \
                             apply_to = function)
#elif defined(__GNUC__)
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,bmi,bmi2,lzcnt,popcnt")
#endif
