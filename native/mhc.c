/* Hyper-connections: the mixture of a site, what its sub-layer reads, and what is written back (spec/model.md 2.2).
 *
 * Sums over columns are sixteen partial sums, as in simd.h; no multiplication is fused with an addition, so
 * that every form below has the same bits. Streams are float32 or bfloat16, all else is float32. */
#include "parallel.h"
#include "simd.h"
#include <math.h>
#include <stdatomic.h>
#include <stdint.h>
#include <string.h>

#define LOWEST -80.0f /* of the argument of a sigmoid, as in model/elementwise.py */

struct site {
    const float *fn, *base, *scale; /* [N, M D], [N], [3]; N = (2 + M) M */
    long streams, width;            /* M, D */
    int iterations;
    float hc_eps, rms_eps;
};

INLINE float dot(const float *a, const float *b, long count)
{
    float lanes[LANES] = {0};
    long i = 0;
    for (; i + LANES <= count; i += LANES)
        for (int n = 0; n < LANES; n++)
            lanes[n] += a[i + n] * b[i + n];
    for (int n = 0; i + n < count; n++)
        lanes[n] += a[i + n] * b[i + n];
    for (int half = LANES / 2; half; half /= 2)
        for (int n = 0; n < half; n++)
            lanes[n] += lanes[n + half];
    return lanes[0];
}

/* With the library's exp: a handful of them for a token, and a chain of divisions follows. */
INLINE float coefficient(float x)
{
    return 1.0f / (1.0f + expf(-(x < LOWEST ? LOWEST : x)));
}

/* Softmax over rows, then columns and rows in turn; the last ones are columns. */
INLINE void sinkhorn(float *matrix, int m, int iterations, float eps)
{
    for (int j = 0; j < m; j++) {
        float most = matrix[j * m], sum = 0.0f;
        for (int k = 1; k < m; k++)
            most = matrix[j * m + k] > most ? matrix[j * m + k] : most;
        for (int k = 0; k < m; k++)
            sum += matrix[j * m + k] = expf(matrix[j * m + k] - most);
        for (int k = 0; k < m; k++)
            matrix[j * m + k] = matrix[j * m + k] / sum + eps;
    }
    for (int n = 0; n < 2 * iterations - 1; n++) {
        int along = n % 2 ? 1 : m, across = n % 2 ? m : 1; /* columns first */
        for (int k = 0; k < m; k++) {
            float sum = 0.0f;
            for (int j = 0; j < m; j++)
                sum += matrix[k * across + j * along];
            for (int j = 0; j < m; j++)
                matrix[k * across + j * along] /= sum + eps;
        }
    }
}

INLINE void read_rows(const struct site *s, const void *streams, int halves, long rows, float *flat, float *mix, void *out)
{
    int m = (int)s->streams, mixing = (2 + m) * m;
    long all = s->streams * s->width, size = halves ? 2 : 4;
    for (long t = 0; t < rows; t++) {
        float *pre = mix + t * mixing, *post = pre + m, *comb = post + m;
        load_row((const char *)streams + t * all * size, halves, all, flat);
        float norm = 1.0f / sqrtf(dot(flat, flat, all) / (float)all + s->rms_eps);
        for (int n = 0; n < mixing; n++)
            pre[n] = dot(flat, s->fn + n * all, all) * norm * s->scale[n < m ? 0 : n < 2 * m ? 1 : 2] + s->base[n];
        for (int n = 0; n < m; n++) {
            pre[n] = coefficient(pre[n]) + s->hc_eps;
            post[n] = 2.0f * coefficient(post[n]);
        }
        sinkhorn(comb, m, s->iterations, s->hc_eps);
        float *sum = flat; /* stream 0, which is not needed any more where it has been read */
        for (long d = 0; d < s->width; d++) {
            float total = pre[0] * flat[d];
            for (int j = 1; j < m; j++)
                total += pre[j] * flat[j * s->width + d];
            sum[d] = total;
        }
        store_row(sum, s->width, (char *)out + t * s->width * size, halves);
    }
}

INLINE void write_rows(const void *streams, const void *output, const float *mix, long rows, long m, long width, int halves, float *work,
                       void *out)
{
    long mixing = (2 + m) * m, size = halves ? 2 : 4;
    float *y = work + m * width, *row = y + width;
    for (long t = 0; t < rows; t++) {
        const float *post = mix + t * mixing + m, *comb = post + m;
        load_row((const char *)streams + t * m * width * size, halves, m * width, work);
        load_row((const char *)output + t * width * size, halves, width, y);
        for (long k = 0; k < m; k++) {
            for (long d = 0; d < width; d++) {
                float mixed = comb[k] * work[d];
                for (long j = 1; j < m; j++)
                    mixed += comb[j * m + k] * work[j * width + d];
                row[d] = post[k] * y[d] + mixed;
            }
            store_row(row, width, (char *)out + (t * m + k) * width * size, halves);
        }
    }
}

#ifdef __x86_64__
#define FORMS(name, parameters, arguments)                                                               \
    __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq"))) static void name##_512 parameters { name##_rows arguments; } \
    __attribute__((target("avx2"))) static void name##_256 parameters { name##_rows arguments; }         \
    static void name##_plain parameters { name##_rows arguments; }
#define CHOOSE(name, level) (level == 2 ? name##_512 : level == 1 ? name##_256 : name##_plain)
#else
#define FORMS(name, parameters, arguments) static void name##_plain parameters { name##_rows arguments; }
#define CHOOSE(name, level) ((void)level, name##_plain)
#endif

FORMS(read, (const struct site *s, const void *streams, int halves, long rows, float *flat, float *mix, void *out),
      (s, streams, halves, rows, flat, mix, out))
FORMS(write, (const void *streams, const void *output, const float *mix, long rows, long m, long width, int halves, float *work, void *out),
      (streams, output, mix, rows, m, width, halves, work, out))

struct job {
    struct site site;
    const void *streams, *output;
    const float *given; /* coefficients of what is written */
    float *mix;
    void *out;
    int halves, level;
    long rows;
    atomic_int failed;
};

#define ROWS_OF_A_PART 16

static void read_part(void *context, long n)
{
    struct job *j = context;
    long begin = n * ROWS_OF_A_PART, rows = j->rows - begin < ROWS_OF_A_PART ? j->rows - begin : ROWS_OF_A_PART;
    long m = j->site.streams, width = j->site.width;
    float *flat = room_of(ROWS_ROOM, (size_t)(m * width) * sizeof *flat);
    if (flat)
        CHOOSE(read, j->level)(&j->site, row_of(j->streams, begin, m * width, j->halves), j->halves, rows, flat, j->mix + begin * (2 + m) * m,
                               (void *)row_of(j->out, begin, width, j->halves));
    else
        atomic_store(&j->failed, 1);
}

static void write_part(void *context, long n)
{
    struct job *j = context;
    long begin = n * ROWS_OF_A_PART, rows = j->rows - begin < ROWS_OF_A_PART ? j->rows - begin : ROWS_OF_A_PART;
    long m = j->site.streams, width = j->site.width;
    float *work = room_of(ROWS_ROOM, (size_t)((m + 2) * width) * sizeof *work);
    if (work)
        CHOOSE(write, j->level)(row_of(j->streams, begin, m * width, j->halves), row_of(j->output, begin, width, j->halves),
                                j->given + begin * (2 + m) * m, rows, m, width, j->halves, work, (void *)row_of(j->out, begin, m * width, j->halves));
    else
        atomic_store(&j->failed, 1);
}

static int run(void (*part)(void *, long), struct job *j, int threads)
{
    in_parallel(part, j, (j->rows + ROWS_OF_A_PART - 1) / ROWS_OF_A_PART, threads);
    return atomic_load(&j->failed) ? -1 : 0;
}

/* What a sub-layer reads [T, D], and the coefficients [T, N]. */
int mhc_read(const void *streams, int halves, long rows, long m, long width, const float *fn, const float *base, const float *scale, int iterations,
             float hc_eps, float rms_eps, float *mix, void *out, int level, int threads);

int mhc_read(const void *streams, int halves, long rows, long m, long width, const float *fn, const float *base, const float *scale,
                   int iterations, float hc_eps, float rms_eps, float *mix, void *out, int level, int threads)
{
    struct job j = {.site = {fn, base, scale, m, width, iterations, hc_eps, rms_eps}, .streams = streams, .mix = mix, .out = out, .halves = halves,
                    .level = level, .rows = rows};
    return run(read_part, &j, threads);
}

/* The new streams [T, M, D]. */
int hadal_mhc_write(const void *streams, const void *output, int halves, long rows, long m, long width, const float *mix, void *out, int level,
                    int threads)
{
    struct job j = {.site = {.streams = m, .width = width}, .streams = streams, .output = output, .given = mix, .out = out, .halves = halves,
                    .level = level, .rows = rows};
    return run(write_part, &j, threads);
}
