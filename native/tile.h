/* Dot products of several rows with several rows: what all products are made of. */
#ifndef HADAL_TILE_H
#define HADAL_TILE_H

#include "pairs.h"

/* y[t * stride + o] = x[t] . w[o], of rows of floats, a multiple of LANES, or of what pairs.h calls exact (`exactly`), a multiple of
 * COLUMNS; `bytes` of them. Counts are constants where it is called. */
#ifdef LEVEL_AVX2
/* Eight columns, so that all of it fits in sixteen registers. */
INLINE void half_step(const void *const *x, const void *const *w, long i, int rows, int outputs, __m256 (*sums)[OUTPUTS])
{
    __m256 inputs[ROWS];
#pragma GCC unroll 4
    for (int t = 0; t < rows; t++) {
        inputs[t] = _mm256_loadu_ps((const float *)x[t] + i);
        __asm__("" : "+x"(inputs[t])); /* or it is loaded again for each of the outputs */
    }
#pragma GCC unroll 4
    for (int o = 0; o < outputs; o++) {
        __m256 weights = _mm256_loadu_ps((const float *)w[o] + i);
#pragma GCC unroll 4
        for (int t = 0; t < rows; t++)
            sums[t][o] = _mm256_fmadd_ps(inputs[t], weights, sums[t][o]);
    }
}

INLINE void tile_of(const void *const *x, const void *const *w, long bytes, int exactly, int rows, int outputs, float *y, long stride)
{
    (void)exactly;
    __m256 low[ROWS][OUTPUTS], high[ROWS][OUTPUTS];
#pragma GCC unroll 4
    for (int t = 0; t < rows; t++)
#pragma GCC unroll 4
        for (int o = 0; o < outputs; o++)
            low[t][o] = high[t][o] = _mm256_setzero_ps();
    for (long i = 0; i < bytes / (long)sizeof(float); i += LANES) {
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
INLINE v16 v16_at(const void *row, long byte) { return v16_load((const float *)((const char *)row + byte)); }

INLINE v16 add_products(int exactly, v16 x, v16 w, v16 sum)
{
#ifdef LEVEL_BF16
    if (exactly)
        return pairs_fma(_mm512_castps_si512(x), _mm512_castps_si512(w), sum);
#endif
    (void)exactly;
    return v16_fma(x, w, sum);
}

#ifdef LEVEL_AVX512
/* The sums of a whole tile together, each in the order of `v16_sum`. */
INLINE void store_sums(v16 (*sums)[OUTPUTS], float *y, long stride)
{
    v16 eight[2][4], four[4], two[2];
#pragma GCC unroll 4
    for (int n = 0; n < 4; n++) {
        int at = n == 1 ? 2 : n == 2 ? 1 : n; /* the last step turns the middle two over */
        for (int m = 0; m < 2; m++) /* rows 0 and 1, 2 and 3 */
            eight[m][n] = _mm512_add_ps(_mm512_shuffle_f32x4(sums[2 * m][at], sums[2 * m + 1][at], 0x44),
                                        _mm512_shuffle_f32x4(sums[2 * m][at], sums[2 * m + 1][at], 0xee));
        four[n] = _mm512_add_ps(_mm512_shuffle_f32x4(eight[0][n], eight[1][n], 0x88), _mm512_shuffle_f32x4(eight[0][n], eight[1][n], 0xdd));
    }
#pragma GCC unroll 2
    for (int n = 0; n < 2; n++) {
        __m512d a = _mm512_castps_pd(four[n]), b = _mm512_castps_pd(four[n + 2]);
        two[n] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
    }
    v16 all = _mm512_add_ps(_mm512_shuffle_ps(two[0], two[1], 0x88), _mm512_shuffle_ps(two[0], two[1], 0xdd));
    _mm_storeu_ps(y, _mm512_castps512_ps128(all));
    _mm_storeu_ps(y + stride, _mm512_extractf32x4_ps(all, 1));
    _mm_storeu_ps(y + 2 * stride, _mm512_extractf32x4_ps(all, 2));
    _mm_storeu_ps(y + 3 * stride, _mm512_extractf32x4_ps(all, 3));
}
#endif

INLINE void tile_of(const void *const *x, const void *const *w, long bytes, int exactly, int rows, int outputs, float *y, long stride)
{
    v16 sums[ROWS][OUTPUTS];
#pragma GCC unroll 4
    for (int t = 0; t < rows; t++)
#pragma GCC unroll 4
        for (int o = 0; o < outputs; o++)
            sums[t][o] = v16_all(0.0f);
    for (long i = 0; i < bytes; i += (long)sizeof(v16)) {
        v16 inputs[ROWS];
#pragma GCC unroll 4
        for (int t = 0; t < rows; t++)
            inputs[t] = v16_at(x[t], i);
#pragma GCC unroll 4
        for (int o = 0; o < outputs; o++) {
            v16 weights = v16_at(w[o], i);
#pragma GCC unroll 4
            for (int t = 0; t < rows; t++)
                sums[t][o] = add_products(exactly, inputs[t], weights, sums[t][o]);
        }
    }
#ifdef LEVEL_AVX512
    if (rows == ROWS && outputs == OUTPUTS) {
        store_sums(sums, y, stride);
        return;
    }
#endif
#pragma GCC unroll 4
    for (int t = 0; t < rows; t++)
#pragma GCC unroll 4
        for (int o = 0; o < outputs; o++)
            y[t * stride + o] = v16_sum(sums[t][o]);
}
#endif

INLINE void few_rows(const void *const *x, const void *const *w, long bytes, int exactly, int rows, int outputs, float *y, long stride)
{
    if (outputs == OUTPUTS) {
        if (rows == ROWS)
            tile_of(x, w, bytes, exactly, ROWS, OUTPUTS, y, stride);
        else
            for (int t = 0; t < rows; t++)
                tile_of(x + t, w, bytes, exactly, 1, OUTPUTS, y + t * stride, stride);
    } else {
        for (int t = 0; t < rows; t++)
            for (int o = 0; o < outputs; o++)
                tile_of(x + t, w + o, bytes, exactly, 1, 1, y + t * stride + o, stride);
    }
}

INLINE void dots_of(const void *const *x, const void *const *w, long bytes, int exactly, long rows, long outputs, float *y, long stride)
{
    for (long t = 0; t < rows; t += ROWS) {
        int few = rows - t < ROWS ? (int)(rows - t) : ROWS;
        for (long o = 0; o < outputs; o += OUTPUTS)
            few_rows(x + t, w + o, bytes, exactly, few, outputs - o < OUTPUTS ? (int)(outputs - o) : OUTPUTS, y + t * stride + o, stride);
    }
}

/* The same for any number of either; what is given of w should stay in the first cache. */
static void dots(const void *const *x, const void *const *w, long bytes, int exactly, long rows, long outputs, float *y, long stride)
{
#ifdef LEVEL_BF16
    if (exactly) {
        dots_of(x, w, bytes, 1, rows, outputs, y, stride);
        return;
    }
#endif
    dots_of(x, w, bytes, 0, rows, outputs, y, stride);
    (void)exactly;
}

#endif
