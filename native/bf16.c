#ifdef __x86_64__
#pragma GCC target("avx512bf16,avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")
#define LEVEL_AVX512
#define LEVEL_BF16
#define LEVEL_TABLE bf16_level
#include "kernels.h"
#endif
