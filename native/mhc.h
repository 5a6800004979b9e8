/* Hyper-connections: the mixture of a site, what its sub-layer reads, and what is written back (spec/model.md 2.2).
 *
 * Streams are float32 or bfloat16, all else is float32. */
#ifndef HADAL_MHC_H
#define HADAL_MHC_H

#include "parallel.h"
#include "rows.h"
#include "tile.h"
#include <stdatomic.h>

#define TOKENS 16 /* of a part; a multiple of every ROWS but three */
#define MOST_STREAMS 16

struct mixture {
    const void *streams; /* [T, M, D] */
    int halves;
    long tokens, m, width;          /* T, M, D */
    const float *fn, *base, *scale; /* [N, M D], [N], [3]; N = (2 + M) M */
    int iterations;
    float hc_eps, rms_eps;
    float *mix; /* [T, N] */
    void *out;  /* [T, D] */
    atomic_int failed;
};

/* Softmax over rows, then columns and rows in turn; the last ones are columns. Matrices of `tokens` tokens lie in each other. */
INLINE void sinkhorn(float (*matrix)[TOKENS], int m, int iterations, float eps, int tokens)
{
    for (int j = 0; j < m; j++) {
        float most[TOKENS], sum[TOKENS] = {0};
        memcpy(most, matrix[j * m], sizeof most);
        for (int k = 1; k < m; k++)
            for (int t = 0; t < tokens; t++)
                most[t] = matrix[j * m + k][t] > most[t] ? matrix[j * m + k][t] : most[t];
        for (int k = 0; k < m; k++)
            for (int t = 0; t < tokens; t++)
                sum[t] += matrix[j * m + k][t] = exponential(matrix[j * m + k][t] - most[t]);
        for (int k = 0; k < m; k++)
            for (int t = 0; t < tokens; t++)
                matrix[j * m + k][t] = matrix[j * m + k][t] / sum[t] + eps;
    }
    for (int n = 0; n < 2 * iterations - 1; n++) {
        int along = n % 2 ? 1 : m, across = n % 2 ? m : 1; /* columns first */
        for (int k = 0; k < m; k++) {
            float sum[TOKENS] = {0};
            for (int j = 0; j < m; j++)
                for (int t = 0; t < tokens; t++)
                    sum[t] += matrix[k * across + j * along][t];
            for (int t = 0; t < tokens; t++)
                sum[t] += eps;
            for (int j = 0; j < m; j++)
                for (int t = 0; t < tokens; t++)
                    matrix[k * across + j * along][t] /= sum[t];
        }
    }
}

/* From what the streams give, [N][tokens], to coefficients. `m` and `tokens` are constants where it is called, if they are usual. */
INLINE void coefficients(const struct mixture *s, float (*mix)[TOKENS], int m, int tokens)
{
    for (int n = 0; n < 2 * m; n++)
        for (int t = 0; t < tokens; t++)
            mix[n][t] = n < m ? sigmoid(mix[n][t]) + s->hc_eps : 2.0f * sigmoid(mix[n][t]);
    sinkhorn(mix + 2 * m, m, s->iterations, s->hc_eps, tokens);
}

/* out = sum over streams of by[j * stride] x[j], in their order. */
INLINE void mix_streams(const float *x, const float *by, long stride, int m, long width, float *out)
{
    for (long d = 0; d < width; d++) {
        float total = by[0] * x[d];
        for (int j = 1; j < m; j++)
            total += by[j * stride] * x[j * width + d];
        out[d] = total;
    }
}

INLINE void mixed_streams(const float *x, const float *by, long stride, int m, long width, float *out)
{
    if (m == 4)
        mix_streams(x, by, stride, 4, width, out); /* a loop of vectors */
    else
        mix_streams(x, by, stride, m, width, out);
}

/* Rows as floats with zeros up to a multiple of LANES: where they lie, or copied. */
INLINE void padded_rows(const float *rows, long count, long columns, long across, float *room, const void **at)
{
    for (long n = 0; n < count; n++) {
        at[n] = rows + n * columns;
        if (across != columns) {
            at[n] = memcpy(room + n * across, rows + n * columns, (size_t)columns * sizeof *room);
            memset(room + n * across + columns, 0, (size_t)(across - columns) * sizeof *room);
        }
    }
}

/* The dynamic part of some tokens' mixtures, normed, and the static one: [N][tokens]. */
INLINE void raw_mixture(const struct mixture *s, const void *const *x, const void *const *fn, long across, int tokens, float (*mix)[TOKENS])
{
    int m = (int)s->m, mixing = (2 + m) * m;
    float sums[TOKENS][(2 + MOST_STREAMS) * MOST_STREAMS];
    dots(x, fn, across * (long)sizeof(float), 0, tokens, mixing, sums[0], (2 + MOST_STREAMS) * MOST_STREAMS);
    for (int t = 0; t < tokens; t++) {
        float norm = 1.0f / sqrtf(squares_of(x[t], across) / (float)(s->m * s->width) + s->rms_eps);
        for (int n = 0; n < mixing; n++)
            mix[n][t] = sums[t][n] * norm * s->scale[n < m ? 0 : n < 2 * m ? 1 : 2] + s->base[n];
    }
}

static void read_part(void *context, long part)
{
    struct mixture *s = context;
    long first = part * TOKENS, all = s->m * s->width, across = (all + LANES - 1) / LANES * LANES;
    int m = (int)s->m, mixing = (2 + m) * m, tokens = (int)(s->tokens - first < TOKENS ? s->tokens - first : TOKENS);
    long copied = across == all ? 0 : mixing;
    float *room = room_of(ROWS_ROOM, (size_t)((TOKENS + copied) * across + s->width) * sizeof *room), *row = room + (TOKENS + copied) * across;
    if (!room) {
        atomic_store(&s->failed, 1);
        return;
    }
    const void *x[TOKENS] = {NULL}, *fn[(2 + MOST_STREAMS) * MOST_STREAMS];
    float mix[(2 + MOST_STREAMS) * MOST_STREAMS][TOKENS];
    padded_rows(s->fn, mixing, all, across, room + TOKENS * across, fn);
    for (int t = 0; t < tokens; t++) {
        float *own = room + t * across;
        load_row(row_of(s->streams, first + t, all, s->halves), s->halves, all, own);
        memset(own + all, 0, (size_t)(across - all) * sizeof *own);
        x[t] = own;
    }
    raw_mixture(s, x, fn, across, tokens, mix);
    for (int n = 0; n < mixing; n++) /* so that no lane holds what is no number */
        for (int t = tokens; tokens > 1 && t < TOKENS; t++)
            mix[n][t] = 0.0f;
    if (m == 4 && tokens > 1)
        coefficients(s, mix, 4, TOKENS);
    else if (m == 4)
        coefficients(s, mix, 4, 1);
    else
        coefficients(s, mix, m, tokens);
    for (int t = 0; t < tokens; t++) {
        float *own = s->mix + (first + t) * mixing;
        for (int n = 0; n < mixing; n++)
            own[n] = mix[n][t];
        mixed_streams(x[t], own, 1, m, s->width, row);
        store_row(row, s->width, (void *)row_of(s->out, first + t, s->width, s->halves), s->halves);
    }
}

/* What a sub-layer reads, and the coefficients of the site. */
static int mhc_read(struct mixture s, int threads)
{
    if (s.m > MOST_STREAMS)
        return -1;
    in_parallel(read_part, &s, (s.tokens + TOKENS - 1) / TOKENS, threads);
    return atomic_load(&s.failed) ? -1 : 0;
}

struct writing {
    const void *streams, *output; /* [T, M, D], [T, D] */
    int halves;
    long tokens, m, width;
    const float *mix; /* [T, N] */
    void *out;        /* [T, M, D] */
    atomic_int failed;
};

static void write_part(void *context, long part)
{
    struct writing *s = context;
    long first = part * TOKENS, last = s->tokens - first < TOKENS ? s->tokens : first + TOKENS, m = s->m, width = s->width;
    float *x = room_of(ROWS_ROOM, (size_t)((m + 2) * width) * sizeof *x), *y = x + m * width, *row = y + width;
    if (!x) {
        atomic_store(&s->failed, 1);
        return;
    }
    for (long t = first; t < last; t++) {
        const float *post = s->mix + t * (2 + m) * m + m, *comb = post + m;
        load_row(row_of(s->streams, t, m * width, s->halves), s->halves, m * width, x);
        load_row(row_of(s->output, t, width, s->halves), s->halves, width, y);
        for (long k = 0; k < m; k++) {
            mixed_streams(x, comb + k, m, (int)m, width, row);
            for (long d = 0; d < width; d++)
                row[d] = post[k] * y[d] + row[d];
            store_row(row, width, (void *)row_of(s->out, t * m + k, width, s->halves), s->halves);
        }
    }
}

/* The new streams. */
static int mhc_write(struct writing s, int threads)
{
    in_parallel(write_part, &s, (s.tokens + TOKENS - 1) / TOKENS, threads);
    return atomic_load(&s.failed) ? -1 : 0;
}

#endif
