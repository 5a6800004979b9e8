/* What src/hadal/model/kernels calls: addresses and sizes, nothing of torch. Functions return 0, or -1 without memory. */
#define LEVEL_TABLE plain_level
#include "kernels.h"

extern const struct level avx2_level, avx512_level, bf16_level;

_Alignas(64) uint16_t scaled_e2m1[256][16], scaled_special_e4m3[256][32];
_Alignas(64) float scaled_e2m1_floats[256][16];

__attribute__((constructor)) static void scale_values(void)
{
    for (int scale = 0; scale < 256; scale++) {
        for (int code = 0; code < 16; code++)
            scaled_e2m1[scale][code] = narrowed(scaled_e2m1_floats[scale][code] = e2m1[code] * power_of_two((uint8_t)scale));
        for (int code = 0; code < 8; code++)
            scaled_special_e4m3[scale][code] = narrowed(e4m3((uint8_t)code) * power_of_two((uint8_t)scale));
        scaled_special_e4m3[scale][31] = narrowed(NAN);
    }
}

/* What this processor can do: the best of plain, AVX2, AVX-512, and that with BF16, counted from 0. */
int hadal_level(void)
{
#ifdef __x86_64__
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq"))
        return __builtin_cpu_supports("avx512bf16") ? 3 : 2;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"))
        return 1;
#endif
    return 0;
}

static const struct level *at(int level)
{
#ifdef __x86_64__
    return level == 3 ? &bf16_level : level == 2 ? &avx512_level : level == 1 ? &avx2_level : &plain_level;
#else
    (void)level;
    return &plain_level;
#endif
}

/* What a sub-layer reads [T, D], normed if a weight is given, and the coefficients of the site [T, N]. */
int hadal_mhc_read(const void *streams, int halves, long rows, long m, long width, const float *fn, const float *base, const float *scale,
                   int iterations, float hc_eps, float rms_eps, const void *norm, float *mix, void *out, int level, int threads)
{
    struct vectors v = {.x = out, .out = out, .halves = halves, .tokens = rows, .heads = 1, .width = width, .normed = 1, .eps = rms_eps,
                        .weight = norm};
    struct mixture s = {streams, halves, rows, m, width, fn, base, scale, iterations, hc_eps, rms_eps, mix, out, 0};
    if (at(level)->mhc_read(s, threads))
        return -1;
    return norm ? at(level)->vectors(v, threads) : 0;
}

/* The new streams [T, M, D]. */
int hadal_mhc_write(const void *streams, const void *output, int halves, long rows, long m, long width, const float *mix, void *out, int level,
                    int threads)
{
    struct writing s = {streams, output, halves, rows, m, width, mix, out, 0};
    return at(level)->mhc_write(s, threads);
}

int hadal_product(const void *x, int x_halves, long rows, const void *codes, const void *scales, int format, long inner, long outer, long groups,
                  int rounds, void *y, int y_halves, int level, int threads)
{
    struct matrix m = {codes, scales, (enum format)format, inner, outer};
    return at(level)->product(x, x_halves, rows, m, groups, rounds, y, y_halves, threads);
}

/* Rows to E4M3 and back in blocks of `block`, in place. */
void hadal_round_rows(float *x, long rows, long inner, long block)
{
    for (long t = 0; t < rows; t++)
        round_row(x + t * inner, inner, block);
}

int hadal_vectors(const void *x, void *out, int halves, long tokens, long heads, long width, int normed, float eps, const void *weight,
                  const float *cos, const float *sin, long rotated, int inverse, int rounds, int level, int threads)
{
    struct vectors v = {x, out, halves, tokens, heads, width, normed, eps, weight, cos, sin, rotated, inverse, rounds, 0};
    return at(level)->vectors(v, threads);
}

int hadal_attend(const void *q, void *out, int halves, long tokens, long heads, long width, const void *near, long before, long window,
                 const void *pages, const int64_t *table, long per_page, long row_bytes, int packing, long rotated, const int64_t *visible,
                 const int64_t *chosen, long most, const float *sink, int level, int threads)
{
    struct store far = {pages, table, per_page, row_bytes, (enum packing)packing, width, rotated};
    struct attention a = {.q = q, .out = out, .halves = halves, .tokens = tokens, .heads = heads, .width = width, .near = near, .before = before,
                          .window = window, .far = pages ? &far : NULL, .visible = visible, .chosen = chosen, .most = most, .sink = sink};
    return at(level)->attend(a, threads);
}

int hadal_choose(const void *q, const void *weight, int halves, long tokens, long heads, long width, const void *pages, const int64_t *table,
                 long per_page, long row_bytes, int packing, const int64_t *visible, long k, long columns, int in_halves, int64_t *index, int level,
                 int threads)
{
    struct store keys = {pages, table, per_page, row_bytes, (enum packing)packing, width, 0};
    struct choice c = {.q = q, .weight = weight, .halves = halves, .tokens = tokens, .heads = heads, .width = width, .keys = &keys,
                       .visible = visible, .k = k, .columns = columns, .in_halves = in_halves, .index = index};
    return at(level)->choose(c, threads);
}

int hadal_route(const void *x, int halves, long tokens, const void *gate, int gate_halves, long width, long experts, const float *bias,
                const int64_t *hash, const int64_t *ids, long active, float factor, int64_t *routes, float *weights, int level, int threads)
{
    struct matrix m = {gate, NULL, gate_halves ? BFLOAT16 : FLOAT32, width, experts};
    struct routing r = {x, halves, tokens, m, bias, hash, ids, active, factor, routes, weights};
    return at(level)->route(r, threads);
}

int hadal_project(const void *x, int halves, int rounds, long count, const int64_t *positions, const float *cos, const float *sin, long rotated,
                  float eps, const int64_t *table, long heads, long index_heads, float index_scale, int kept, int kind, void *latent, void *q,
                  void *key, float *kv, float *gate, void *index_q, void *index_weight, float *index_kv, float *index_gate, int level, int threads)
{
    struct tokens t = {x, halves, rounds, count, positions, cos, sin, rotated, eps, threads};
    return at(level)->project(t, table, heads, index_heads, index_scale, kept, kind, latent, q, key, kv, gate, index_q, index_weight, index_kv,
                              index_gate);
}

/* `x` [T, H, K] is rotated back where it lies. */
int hadal_attention_output(void *x, int halves, int rounds, long count, const float *cos, const float *sin, long rotated, const int64_t *table,
                           long heads, long groups, void *middle, void *out, int level, int threads)
{
    struct tokens t = {.x = x, .halves = halves, .rounds = rounds, .count = count, .cos = cos, .sin = sin, .rotated = rotated, .threads = threads};
    return at(level)->attention_output(t, table, heads, groups, middle, out);
}

int hadal_feed_forward(const void *x, int halves, int rounds, long count, const int64_t *table, const int64_t *ids, long experts, long active,
                       float factor, float limit, void *out, int level, int threads)
{
    struct tokens t = {.x = x, .halves = halves, .rounds = rounds, .count = count, .threads = threads};
    return at(level)->feed_forward(t, table, ids, experts, active, factor, limit, out);
}

int hadal_swiglu(const void *gate, const void *up, int halves, long rows, long width, float limit, const float *scale, void *out, int level,
                 int threads)
{
    (void)threads;
    at(level)->swiglu_rows(gate, up, halves, rows, width, limit, scale, out);
    return 0;
}

/* `matrices` has seven numbers for each expert, the shared one last: its id, and codes and scales of w1, w3 and w2. */
int hadal_experts(const void *x, int halves, long tokens, const int64_t *matrices, long count, int format, int shared_format, long inner,
                  long hidden, long outer, const int64_t *routes, const float *weights, long active, float limit, int rounds, void *out, int level,
                  int threads)
{
    struct expert expert[count];
    int64_t ids[count];
    for (long n = 0; n < count; n++) {
        const int64_t *own = matrices + 7 * n;
        enum format stored = (enum format)(n == count - 1 ? shared_format : format);
        ids[n] = own[0];
        expert[n].w1 = (struct matrix){(const void *)own[1], (const void *)own[2], stored, inner, hidden};
        expert[n].w3 = (struct matrix){(const void *)own[3], (const void *)own[4], stored, inner, hidden};
        expert[n].w2 = (struct matrix){(const void *)own[5], (const void *)own[6], stored, hidden, outer};
    }
    return at(level)->experts(x, halves, tokens, expert, count, ids, routes, weights, active, limit, rounds, out, threads);
}

/* Windows of tokens to entries [C, width]; `before` are the rows of the window before them, or NULL where windows do not overlap. */
int hadal_pool(const float *kv, const float *gate, const float *before_kv, const float *before_gate, long rate, long width, long count, float *out,
               int level, int threads)
{
    struct pooling p = {kv, gate, before_kv, before_gate, before_kv ? 2 * width : width, width, rate, width, count, out};
    at(level)->pool(p, threads);
    return 0;
}

#include "decode.h"
