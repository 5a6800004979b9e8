/* What is done to every vector alone: RMS norm, rotation of its last columns, rounding as the cache stores it. */
#ifndef HADAL_ROWS_H
#define HADAL_ROWS_H

#include "matrix.h"
#include "parallel.h"
#include <stdatomic.h>

#define KV_BLOCK 64

struct vectors {
    const void *x;
    void *out;
    int halves;
    long tokens, heads, width;
    int normed;
    float eps;
    const void *weight; /* of the norm, as x; or NULL */
    const float *cos, *sin; /* [tokens, rotated / 2] */
    long rotated;           /* of the columns, at the end */
    int inverse, rounds;    /* rounds: as FP8 and BF16 in the cache */
    atomic_int failed;
};

INLINE float squares_of(const float *x, long count)
{
    v16 sums = v16_all(0.0f);
    long i = 0;
    for (; i + LANES <= count; i += LANES)
        sums = v16_fma(v16_load(x + i), v16_load(x + i), sums);
    float rest[LANES] = {0};
    for (int n = 0; i + n < count; n++)
        rest[n] = x[i + n];
    return v16_sum(v16_fma(v16_load(rest), v16_load(rest), sums));
}

INLINE void rotate_row(float *x, const float *cos, const float *sin, long pairs, float sign)
{
    for (long n = 0; n < pairs; n++) {
        float even = x[2 * n], odd = x[2 * n + 1], s = sign * sin[n];
        x[2 * n] = even * cos[n] - odd * s;
        x[2 * n + 1] = even * s + odd * cos[n];
    }
}

INLINE void norm_row(float *x, long width, const void *weight, int halves, float eps)
{
    float factor = 1.0f / sqrtf(squares_of(x, width) / (float)width + eps);
    for (long i = 0; i < width; i++)
        x[i] *= factor;
    for (long i = 0; weight && i < width; i++)
        x[i] *= halves ? widened(((const uint16_t *)weight)[i]) : ((const float *)weight)[i];
    round_halves(x, width, halves);
}

INLINE void finish_row(const struct vectors *v, long row, float *x)
{
    long plain = v->width - v->rotated, pairs = v->rotated / 2, token = row / v->heads;
    load_row(row_of(v->x, row, v->width, v->halves), v->halves, v->width, x);
    if (v->normed)
        norm_row(x, v->width, v->weight, v->halves, v->eps);
    if (pairs)
        rotate_row(x + plain, v->cos + token * pairs, v->sin + token * pairs, pairs, v->inverse ? -1.0f : 1.0f);
    if (v->rounds) {
        round_halves(x, v->width, v->halves);
        round_row(x, plain, KV_BLOCK);
        round_halves(x + plain, v->rotated, 1);
    }
    store_row(x, v->width, (void *)row_of(v->out, row, v->width, v->halves), v->halves);
}

#define VECTORS_AT_ONCE 64

static void vectors_part(void *context, long n)
{
    struct vectors *v = context;
    long rows = v->tokens * v->heads, end = (n + 1) * VECTORS_AT_ONCE < rows ? (n + 1) * VECTORS_AT_ONCE : rows;
    float *x = room_of(ROWS_ROOM, (size_t)v->width * sizeof *x);
    if (!x)
        atomic_store(&v->failed, 1);
    for (long row = n * VECTORS_AT_ONCE; x && row < end; row++)
        finish_row(v, row, x);
}

static int vectors(struct vectors v, int threads)
{
    in_parallel(vectors_part, &v, (v.tokens * v.heads + VECTORS_AT_ONCE - 1) / VECTORS_AT_ONCE, threads);
    return atomic_load(&v.failed) ? -1 : 0;
}

#endif
