#ifdef __x86_64__
#pragma GCC target("avx2,fma,f16c")
#define LEVEL_AVX2
#define LEVEL_TABLE avx2_level
#include "kernels.h"
#endif
