/* y = x W^T, W as it is stored. The sum of an output has one order, whatever it is computed beside, so a token decoded
 * alone has the bits that it has in a prefill. Rows of W are unpacked for many rows of x at once, into memory that stays
 * in a cache; nothing of the size of the matrix is ever made. */
#ifndef HADAL_PRODUCT_H
#define HADAL_PRODUCT_H

#include "matrix.h"
#include "parallel.h"
#include "tile.h"
#include <stdatomic.h>

#define ROWS_AT_ONCE 48 /* of x: a multiple of every ROWS; with 512 columns a fifth of the second cache */
#define ROWS_OF_PART (4 * ROWS_AT_ONCE) /* for which outputs are unpacked once */
#define MOST_OUTPUTS LANES /* of a block */
#ifdef LEVEL_AVX512
#define NEAR_BYTES 32768 /* of W for many rows of x: it stays in the first cache, where rows of x pass */
#else
#define NEAR_BYTES 16384
#endif
#define THIN 4 /* outputs of a tile of one or two rows */

struct product {
    struct matrix matrix;
    const void *x; /* [rows, groups, row_bytes]: floats, or exact where the products are; zeros up to a multiple of COLUMNS */
    int exactly;
    long rows, row_bytes, width, groups;
    void *y;     /* [rows, outer] */
    int halves;  /* of y */
    long outputs_at_once, output_parts, row_parts, rows_of_part, part;
    atomic_int failed;
};

INLINE long padded(long columns) { return (columns + COLUMNS - 1) / COLUMNS * COLUMNS; }

INLINE long size_of(int exactly) { return exactly ? (long)sizeof(exact) : (long)sizeof(float); }

/* Where a row of a matrix is read from. */
struct reading {
    const char *codes;
    const void *scales;
};

INLINE struct reading reading_of(const struct matrix *m, enum format format, long row)
{
    long spans = format == FP4 ? m->inner / BLOCK : (m->inner + TILE - 1) / TILE, at = format == FP4 ? row * spans : row / TILE * spans;
    long size = format == FP8_FLOAT_SCALES ? 4 : 1;
    return (struct reading){(const char *)m->codes + row * m->inner * bits_of(format) / 8, (const char *)m->scales + at * size};
}

/* What to multiply what `two_codes` returns with, in the n-th span of columns. */
INLINE v16 factor_of(const struct reading *r, enum format format, long n)
{
    if (format == FP8_FLOAT_SCALES)
        return v16_all(0x1p8f * ((const float *)r->scales)[n]);
    return v16_all((format == FP4 ? 0.5f : 0x1p8f) * power_of_two(((const uint8_t *)r->scales)[n]));
}

/* Two times LANES columns from i on, or LANES. What is needed a few rows later is fetched: without that one thread reads
 * memory at half of its speed. */
INLINE void thin_step(const struct reading *r, enum format format, long i, int both, v16 factor, const void *const *x, int rows, v16 *sums)
{
    v16 weights[2];
    const char *at = r->codes + i * bits_of(format) / 8;
    if (i * bits_of(format) % 512 == 0)
        __builtin_prefetch(at + 4096);
    two_codes(format, at, both, weights);
#pragma GCC unroll 4
    for (int n = 0; n < 1 + both; n++) {
        if (format != FLOAT32 && format != BFLOAT16)
            weights[n] = v16_mul(weights[n], factor);
#pragma GCC unroll 4
        for (int t = 0; t < rows; t++)
            sums[t] = v16_fma(v16_load((const float *)x[t] + i + n * LANES), weights[n], sums[t]);
    }
}

/* Products of one or two rows with outputs `first`, ..., straight from how they are stored. */
INLINE void thin_tile(const struct matrix *m, enum format format, const void *const *x, int rows, long first, int outputs, float *y, long stride)
{
    int scaled = format != FLOAT32 && format != BFLOAT16;
    long inner = m->inner, span = !scaled ? inner : format == FP4 ? BLOCK : TILE;
    struct reading from[THIN];
    v16 sums[THIN][2], factor[THIN];
#pragma GCC unroll 4
    for (int o = 0; o < outputs; o++) {
        from[o] = reading_of(m, format, first + o);
        factor[o] = sums[o][0] = sums[o][1] = v16_all(0.0f);
    }
    for (long begin = 0, n = 0; begin < inner; begin += span, n++) {
        long end = begin + span < inner ? begin + span : inner, i = begin;
#pragma GCC unroll 4
        for (int o = 0; scaled && o < outputs; o++)
            factor[o] = factor_of(&from[o], format, n);
        for (; i + 2 * LANES <= end; i += 2 * LANES)
#pragma GCC unroll 4
            for (int o = 0; o < outputs; o++)
                thin_step(&from[o], format, i, 1, factor[o], x, rows, sums[o]);
        for (int o = 0; format != FP4 && i < end && o < outputs; o++)
            thin_step(&from[o], format, i, 0, factor[o], x, rows, sums[o]);
    }
#pragma GCC unroll 4
    for (int t = 0; t < rows; t++)
#pragma GCC unroll 4
        for (int o = 0; o < outputs; o++)
            y[t * stride + o] = v16_sum(sums[o][t]);
}

/* Columns that have one scale. */
INLINE long span_of(const struct matrix *m, enum format format) { return format == FP4 ? BLOCK : format == FP8 ? TILE : m->inner; }

/* For the n-th span of columns. */
INLINE struct scaling scaling_in(const struct reading *r, enum format format, long n)
{
    return scaling_of(format, format == BFLOAT16 ? 0 : ((const uint8_t *)r->scales)[n]);
}

/* Thirty-two columns of an output from i on. */
INLINE pairs stored_pairs(const struct reading *r, enum format format, long i, const struct scaling *s)
{
    const char *at = r->codes + i * bits_of(format) / 8;
    if (i * bits_of(format) % 512 == 0)
        __builtin_prefetch(at + 4096);
    return pairs_of_codes(format, at, s);
}

/* The same as `thin_tile`, of exact rows. */
INLINE void exact_tile(const struct matrix *m, enum format format, const void *const *x, int rows, long first, int outputs, float *y, long stride)
{
    struct reading from[THIN];
    struct scaling scaling[THIN];
    v16 sums[THIN][2];
    long inner = m->inner, span = span_of(m, format);
#pragma GCC unroll 4
    for (int o = 0; o < outputs; o++) {
        from[o] = reading_of(m, format, first + o);
        sums[o][0] = sums[o][1] = v16_all(0.0f);
    }
    for (long begin = 0, n = 0; begin < inner; begin += span, n++) {
        long end = begin + span < inner ? begin + span : inner;
#pragma GCC unroll 4
        for (int o = 0; o < outputs; o++)
            scaling[o] = scaling_in(&from[o], format, n);
        for (long i = begin; i < end; i += COLUMNS)
#pragma GCC unroll 4
            for (int o = 0; o < outputs; o++) {
                pairs weights = stored_pairs(&from[o], format, i, &scaling[o]);
#pragma GCC unroll 4
                for (int t = 0; t < rows; t++)
                    sums[o][t] = pairs_fma(pairs_load((const exact *)x[t] + i), weights, sums[o][t]);
            }
    }
#pragma GCC unroll 4
    for (int t = 0; t < rows; t++)
#pragma GCC unroll 4
        for (int o = 0; o < outputs; o++)
            y[t * stride + o] = v16_sum(sums[o][t]);
}

INLINE void one_tile(const struct matrix *m, enum format format, int exactly, const void *const *x, int rows, long first, int outputs, float *y,
                     long stride)
{
    if (exactly)
        exact_tile(m, format, x, rows, first, outputs, y, stride);
    else
        thin_tile(m, format, x, rows, first, outputs, y, stride);
}

INLINE void thin_format(const struct matrix *m, enum format format, int exactly, const void *const *x, long rows, long first, long outputs, float *y,
                        long stride)
{
    for (long o = 0; o < outputs; o += THIN) {
        float *at = y + o;
        if (outputs - o < THIN)
            for (long t = 0; t < rows; t++)
                for (long n = o; n < outputs; n++)
                    one_tile(m, format, exactly, x + t, 1, first + n, 1, y + t * stride + n, stride);
        else if (rows == 2)
            one_tile(m, format, exactly, x, 2, first + o, THIN, at, stride);
        else
            for (long t = 0; t < rows; t++)
                one_tile(m, format, exactly, x + t, 1, first + o, THIN, at + t * stride, stride);
    }
}

#if defined LEVEL_AVX512 && !defined LEVEL_BF16
#define HAS_FP8_TILE
/* FP8 with less to do for a code: as the bits of a float a normal one is too small by 2^120, and what it is multiplied with is
 * made larger by that and by the scale, once for all outputs. Only where that is a float, and exact. Denormal codes would be
 * denormal floats, for which a multiplication takes a hundred times as long: they, and NaN, go the other way. */
INLINE int fits_fp8_tile(const struct matrix *m, long first, float most)
{
    const uint8_t *scales = (const uint8_t *)m->scales + first / TILE * ((m->inner + TILE - 1) / TILE);
    int fits = first / TILE == (first + THIN - 1) / TILE && m->inner % (2 * COLUMNS) == 0;
    for (long n = 0; n < (m->inner + TILE - 1) / TILE; n++)
        fits &= scales[n] > 27 && scales[n] < 227 && most * power_of_two(scales[n]) < 0x1p7f;
    return fits;
}

/* Thirty-two codes as floats, times 2^-120. */
INLINE pairs small_fp8(const char *codes)
{
    __m512i placed = _mm512_slli_epi16(_mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i *)codes)), 4), bits = _mm512_set1_epi32((int)0x87f00000);
    return pairs_of(_mm512_castsi512_ps(_mm512_and_si512(placed, bits)),
                    _mm512_castsi512_ps(_mm512_and_si512(_mm512_slli_epi32(placed, 16), bits)));
}

/* Whether some of sixty-four codes are no normal numbers. */
INLINE int has_special(const char *codes)
{
    __m512i size = _mm512_and_si512(_mm512_loadu_si512(codes), _mm512_set1_epi8(0x7f));
    return _mm512_cmpge_epu8_mask(_mm512_sub_epi8(size, _mm512_set1_epi8(8)), _mm512_set1_epi8(0x7f - 8)) != 0;
}

INLINE void fp8_tile(const struct matrix *m, const float *x, long first, float *y)
{
    const char *codes = (const char *)m->codes + first * m->inner;
    const uint8_t *scales = (const uint8_t *)m->scales + first / TILE * ((m->inner + TILE - 1) / TILE);
    v16 sums[THIN];
    for (int o = 0; o < THIN; o++)
        sums[o] = v16_all(0.0f);
    for (long i = 0; i < m->inner; i += 2 * COLUMNS) {
        v16 factor = v16_all(0x1p60f * (0x1p60f * power_of_two(scales[i / TILE])));
        pairs plain[2] = {pairs_load(x + i), pairs_load(x + i + COLUMNS)}, large[2];
#pragma GCC unroll 2
        for (int n = 0; n < 2; n++)
            large[n] = (pairs){v16_mul(plain[n].odd, factor), v16_mul(plain[n].even, factor)};
#pragma GCC unroll 4
        for (int o = 0; o < THIN; o++) {
            const char *at = codes + o * m->inner + i;
            __builtin_prefetch(at + 4096);
            if (__builtin_expect(has_special(at), 0)) {
                struct scaling scaling = scaling_of(FP8, scales[i / TILE]);
                for (int n = 0; n < 2; n++)
                    sums[o] = pairs_fma(plain[n], pairs_of_codes(FP8, at + n * COLUMNS, &scaling), sums[o]);
            } else {
#pragma GCC unroll 2
                for (int n = 0; n < 2; n++)
                    sums[o] = pairs_fma(large[n], small_fp8(at + n * COLUMNS), sums[o]);
            }
        }
    }
    for (int o = 0; o < THIN; o++)
        y[o] = v16_sum(sums[o]);
}

/* By their bits, where a NaN is larger than all else. `count` is a multiple of LANES. */
INLINE float largest_of(const float *x, long count)
{
    __m512i most = _mm512_setzero_si512(), size = _mm512_set1_epi32(0x7fffffff);
    for (long i = 0; i < count; i += LANES)
        most = _mm512_max_epu32(most, _mm512_and_si512(_mm512_loadu_si512(x + i), size));
    union { uint32_t u; float f; } bits = {_mm512_reduce_max_epu32(most)};
    return bits.f;
}

/* One row by outputs from `first` on, a multiple of THIN. Two share what is unpacked, which takes less time than this does twice. */
INLINE void thin_fp8(const struct matrix *m, const void *const *x, long first, long outputs, float *y, long stride)
{
    float most = largest_of(*x, m->inner);
    for (long o = 0; o < outputs; o += THIN)
        if (fits_fp8_tile(m, first + o, most))
            fp8_tile(m, *x, first + o, y + o);
        else
            exact_tile(m, FP8, x, 1, first + o, THIN, y + o, stride);
}
#endif

/* What `dots` does after `unpack_outputs`, without unpacking; with the same bits. */
static void thin_dots(const struct matrix *m, int exactly, const void *const *x, long rows, long first, long outputs, float *y, long stride)
{
    if (exactly) {
        if (m->format == BFLOAT16)
            thin_format(m, BFLOAT16, 1, x, rows, first, outputs, y, stride);
#ifdef HAS_FP8_TILE
        else if (m->format == FP8 && rows == 1 && outputs % THIN == 0)
            thin_fp8(m, x, first, outputs, y, stride);
#endif
        else if (m->format == FP8)
            thin_format(m, FP8, 1, x, rows, first, outputs, y, stride);
        else
            thin_format(m, FP4, 1, x, rows, first, outputs, y, stride);
        return;
    }
    switch (m->format) {
    case FLOAT32: thin_format(m, FLOAT32, 0, x, rows, first, outputs, y, stride); break;
    case BFLOAT16: thin_format(m, BFLOAT16, 0, x, rows, first, outputs, y, stride); break;
    case FP8: thin_format(m, FP8, 0, x, rows, first, outputs, y, stride); break;
    case FP8_FLOAT_SCALES: thin_format(m, FP8_FLOAT_SCALES, 0, x, rows, first, outputs, y, stride); break;
    case FP4: thin_format(m, FP4, 0, x, rows, first, outputs, y, stride); break;
    }
}

INLINE int is_thin(const struct matrix *m, long rows, int exactly) { return rows <= 2 && m->inner % (exactly ? COLUMNS : LANES) == 0; }

INLINE void unpack_exact(const struct matrix *m, enum format format, long row, exact *out)
{
    struct reading from = reading_of(m, format, row);
    long span = span_of(m, format);
    for (long begin = 0, n = 0; begin < m->inner; begin += span, n++) {
        struct scaling scaling = scaling_in(&from, format, n);
        long end = begin + span < m->inner ? begin + span : m->inner, i = begin;
        for (; i + COLUMNS <= end; i += COLUMNS)
            pairs_store(out + i, stored_pairs(&from, format, i, &scaling));
        if (i < end) { /* what follows belongs to another row, or to nobody */
            uint16_t rest[COLUMNS] = {0};
            memcpy(rest, from.codes + i * bits_of(format) / 8, (size_t)((end - i) * bits_of(format) / 8));
            pairs_store(out + i, pairs_of_codes(format, rest, &scaling));
        }
    }
}

/* Where a row of W may be read as it lies. */
INLINE const void *as_stored(const struct matrix *m, int exactly, long row, long width)
{
    if (m->inner == width && m->format == FLOAT32)
        return (const float *)m->codes + row * width;
#ifdef LEVEL_BF16
    if (m->inner == width && m->format == BFLOAT16 && exactly)
        return (const uint16_t *)m->codes + row * width;
#endif
    (void)exactly;
    return NULL;
}

/* Rows of W for `dots`, with zeros up to `width`: where they lie, or in `room`. */
static void unpack_outputs(const struct matrix *m, int exactly, long first, long count, long width, void *room, const void **w)
{
    for (long o = 0; o < count; o++) {
        char *own = (char *)room + o * width * size_of(exactly);
        w[o] = as_stored(m, exactly, first + o, width);
        if (w[o])
            continue;
        w[o] = own;
        if (!exactly) {
            unpack_row(m, first + o, (float *)own);
            memset(own + m->inner * (long)sizeof(float), 0, (size_t)(width - m->inner) * sizeof(float));
        } else if (m->format == FP4) {
            unpack_exact(m, FP4, first + o, (exact *)own);
        } else if (m->format == FP8) {
            unpack_exact(m, FP8, first + o, (exact *)own);
        } else {
            unpack_exact(m, BFLOAT16, first + o, (exact *)own);
        }
    }
}

/* Some rows of x by outputs `first` and the next, all of one group: `w`, or NULL to read them as they are stored. */
INLINE void product_block(const struct product *p, const void *const *x, long begin, long rows, long first, long outputs, const void *const *w)
{
    const struct matrix *m = &p->matrix;
    float sums[ROWS_AT_ONCE * MOST_OUTPUTS], *y = p->halves ? sums : (float *)p->y + begin * m->outer + first;
    long stride = p->halves ? MOST_OUTPUTS : m->outer;
    if (w)
        dots(x, w, p->row_bytes, p->exactly, rows, outputs, y, stride);
    else
        thin_dots(m, p->exactly, x, rows, first, outputs, y, stride);
    for (long t = 0; p->halves && t < rows; t++)
        store_row(sums + t * MOST_OUTPUTS, outputs, (uint16_t *)p->y + (begin + t) * m->outer + first, 1);
}

/* Some outputs, `first` up to `last`, for rows `begin` up to `end`. */
INLINE void product_outputs(const struct product *p, long begin, long end, long first, long last, void *weights)
{
    const void *x[ROWS_AT_ONCE], *w[MOST_OUTPUTS];
    int thin = is_thin(&p->matrix, end - begin, p->exactly);
    long group = first * p->groups / p->matrix.outer;
    if (!thin)
        unpack_outputs(&p->matrix, p->exactly, first, last - first, p->width, weights, w);
    for (; begin < end; begin += ROWS_AT_ONCE) {
        long rows = end - begin < ROWS_AT_ONCE ? end - begin : ROWS_AT_ONCE;
        for (long t = 0; t < rows; t++)
            x[t] = (const char *)p->x + ((begin + t) * p->groups + group) * p->row_bytes;
        product_block(p, x, begin, rows, first, last - first, thin ? NULL : w);
    }
}

static void product_part(void *context, long n)
{
    struct product *p = context;
    long size = p->matrix.outer / p->groups, group = n / p->row_parts / p->output_parts;
    long part = n / p->row_parts % p->output_parts, begin = n % p->row_parts * p->rows_of_part;
    long first = group * size + part * p->part, end = first + p->part < (group + 1) * size ? first + p->part : (group + 1) * size;
    long last_row = begin + p->rows_of_part < p->rows ? begin + p->rows_of_part : p->rows;
    void *weights = room_of(WEIGHTS_ROOM, (size_t)(MOST_OUTPUTS * p->row_bytes));
    if (!weights) {
        atomic_store(&p->failed, 1);
        return;
    }
    for (; first < end; first += p->outputs_at_once)
        product_outputs(p, begin, last_row, first, end - first < p->outputs_at_once ? end : first + p->outputs_at_once, weights);
}

/* Parts that are worth a thread's while, and outputs that share what is loaded of x. */
static void divide_product(struct product *p, int threads)
{
    long size = p->matrix.outer / p->groups, fits = NEAR_BYTES / p->row_bytes / 4 * 4;
    p->outputs_at_once = fits < 4 ? 4 : fits > MOST_OUTPUTS ? MOST_OUTPUTS : fits;
    p->rows_of_part = p->rows < 2 * threads * ROWS_OF_PART ? ROWS_AT_ONCE : ROWS_OF_PART;
    p->row_parts = (p->rows + p->rows_of_part - 1) / p->rows_of_part;
    double work = 2.0 * (double)p->rows * (double)p->width * (double)p->matrix.outer;
    long wanted = threads == 1 || work < 2e5 ? 1 : 4 * threads / p->row_parts;
    long parts = wanted < p->groups ? 1 : wanted / p->groups;
    p->part = (size + parts - 1) / parts;
    p->part = (p->part + p->outputs_at_once - 1) / p->outputs_at_once * p->outputs_at_once;
    p->output_parts = (size + p->part - 1) / p->part;
}

static int run_product(struct product *p, int threads)
{
    divide_product(p, threads);
    in_parallel(product_part, p, p->groups * p->output_parts * p->row_parts, threads);
    return atomic_load(&p->failed) ? -1 : 0;
}

struct inputs {
    const void *x;
    long rows, inner, width;
    int halves, rounds, exactly;
    void *out;
    atomic_int failed;
};

static void input_part(void *context, long n)
{
    struct inputs *in = context;
    long begin = n * ROWS_AT_ONCE, end = begin + ROWS_AT_ONCE < in->rows ? begin + ROWS_AT_ONCE : in->rows;
    float *row = room_of(ROWS_ROOM, (size_t)in->width * sizeof *row);
    if (!row) {
        atomic_store(&in->failed, 1);
        return;
    }
    for (long t = begin; t < end; t++) {
        float *floats = in->exactly ? row : (float *)in->out + t * in->width;
        load_row(row_of(in->x, t, in->inner, in->halves), in->halves, in->inner, floats);
        memset(floats + in->inner, 0, (size_t)(in->width - in->inner) * sizeof *floats);
        if (in->rounds)
            round_row(floats, in->inner, TILE);
        for (long i = 0; in->exactly && i < in->width; i += COLUMNS)
            pairs_store((exact *)in->out + t * in->width + i, pairs_of_floats(floats + i));
    }
}

/* Rows with zeros up to `width` columns, as floats or exact; rounded to E4M3 if asked to. -1 without memory. */
static int take_inputs(const void *x, int halves, long rows, long inner, int rounds, int exactly, void *out, long width, int threads)
{
    struct inputs in = {.x = x, .rows = rows, .inner = inner, .width = width, .halves = halves, .rounds = rounds, .exactly = exactly, .out = out};
    in_parallel(input_part, &in, (rows + ROWS_AT_ONCE - 1) / ROWS_AT_ONCE, threads);
    return atomic_load(&in.failed) ? -1 : 0;
}

/* Whether rows may be multiplied as they lie. */
INLINE int lie_ready(int halves, int exactly)
{
#ifdef LEVEL_BF16
    return exactly || !halves;
#else
    return !exactly && !halves;
#endif
}

static int product(const void *x, int x_halves, long rows, struct matrix m, long groups, int rounds, void *y, int y_halves, int threads)
{
    struct product p = {.matrix = m, .x = x, .exactly = is_exact(&m, x_halves), .rows = rows, .width = padded(m.inner), .groups = groups, .y = y,
                        .halves = y_halves};
    p.row_bytes = p.width * size_of(p.exactly);
    if (rounds || p.width != m.inner || !lie_ready(x_halves, p.exactly)) {
        void *inputs = room_of(INPUTS_ROOM, (size_t)(rows * groups * p.row_bytes));
        if (!inputs || take_inputs(x, x_halves, rows * groups, m.inner, rounds, p.exactly, inputs, p.width, threads))
            return -1;
        p.x = inputs;
    }
    return run_product(&p, threads);
}

#endif
