/* Dot products of several rows with several rows: what all products are made of. */
#ifndef HADAL_TILE_H
#define HADAL_TILE_H

#include "simd.h"

/* y[t * stride + o] = x[t] . w[o], of `width` columns, a multiple of LANES. Counts are constants where it is called. */
#ifdef LEVEL_AVX2
/* Eight columns, so that all of it fits in sixteen registers. */
INLINE void half_step(const float *const *x, const float *const *w, long i, int rows, int outputs, __m256 (*sums)[OUTPUTS])
{
    __m256 inputs[ROWS];
#pragma GCC unroll 4
    for (int t = 0; t < rows; t++) {
        inputs[t] = _mm256_loadu_ps(x[t] + i);
        __asm__("" : "+x"(inputs[t])); /* or it is loaded again for each of the outputs */
    }
#pragma GCC unroll 4
    for (int o = 0; o < outputs; o++) {
        __m256 weights = _mm256_loadu_ps(w[o] + i);
#pragma GCC unroll 4
        for (int t = 0; t < rows; t++)
            sums[t][o] = _mm256_fmadd_ps(inputs[t], weights, sums[t][o]);
    }
}

INLINE void tile_of(const float *const *x, const float *const *w, long width, int rows, int outputs, float *y, long stride)
{
    __m256 low[ROWS][OUTPUTS], high[ROWS][OUTPUTS];
#pragma GCC unroll 4
    for (int t = 0; t < rows; t++)
#pragma GCC unroll 4
        for (int o = 0; o < outputs; o++)
            low[t][o] = high[t][o] = _mm256_setzero_ps();
    for (long i = 0; i < width; i += LANES) {
        half_step(x, w, i, rows, outputs, low);
        half_step(x, w, i + 8, rows, outputs, high);
    }
#pragma GCC unroll 4
    for (int t = 0; t < rows; t++)
#pragma GCC unroll 4
        for (int o = 0; o < outputs; o++)
            y[t * stride + o] = v16_sum((v16){low[t][o], high[t][o]});
}
#else
INLINE void tile_of(const float *const *x, const float *const *w, long width, int rows, int outputs, float *y, long stride)
{
    v16 sums[ROWS][OUTPUTS];
#pragma GCC unroll 4
    for (int t = 0; t < rows; t++)
#pragma GCC unroll 4
        for (int o = 0; o < outputs; o++)
            sums[t][o] = v16_all(0.0f);
    for (long i = 0; i < width; i += LANES) {
        v16 inputs[ROWS];
#pragma GCC unroll 4
        for (int t = 0; t < rows; t++)
            inputs[t] = v16_load(x[t] + i);
#pragma GCC unroll 4
        for (int o = 0; o < outputs; o++) {
            v16 weights = v16_load(w[o] + i);
#pragma GCC unroll 4
            for (int t = 0; t < rows; t++)
                sums[t][o] = v16_fma(inputs[t], weights, sums[t][o]);
        }
    }
#pragma GCC unroll 4
    for (int t = 0; t < rows; t++)
#pragma GCC unroll 4
        for (int o = 0; o < outputs; o++)
            y[t * stride + o] = v16_sum(sums[t][o]);
}
#endif

INLINE void few_rows(const float *const *x, const float *const *w, long width, int rows, int outputs, float *y, long stride)
{
    if (outputs == OUTPUTS) {
        if (rows == ROWS)
            tile_of(x, w, width, ROWS, OUTPUTS, y, stride);
        else
            for (int t = 0; t < rows; t++)
                tile_of(x + t, w, width, 1, OUTPUTS, y + t * stride, stride);
    } else {
        for (int t = 0; t < rows; t++)
            for (int o = 0; o < outputs; o++)
                tile_of(x + t, w + o, width, 1, 1, y + t * stride + o, stride);
    }
}

/* The same for any number of either; what is given of w should stay in the first cache. */
INLINE void dots(const float *const *x, const float *const *w, long width, long rows, long outputs, float *y, long stride)
{
    for (long t = 0; t < rows; t += ROWS) {
        int few = rows - t < ROWS ? (int)(rows - t) : ROWS;
        for (long o = 0; o < outputs; o += OUTPUTS)
            few_rows(x + t, w + o, width, few, outputs - o < OUTPUTS ? (int)(outputs - o) : OUTPUTS, y + t * stride + o, stride);
    }
}

#endif
