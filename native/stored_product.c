/* Products with matrices as checkpoints store them: FP8 E4M3 in tiles of 128x128, FP4 E2M1 in blocks of 32.
 *
 * y[t][o] is one sum over the columns in one order, whatever t and o are computed beside: sixteen partial sums,
 * of the columns i, i+16, i+32, ..., added in pairs at the end. So a token decoded alone has the bits that it
 * has in a prefill. Rows of the matrix are unpacked once for all rows of x, into a buffer that stays in the
 * first cache; nothing of the size of the matrix is ever made.
 *
 * Three forms of the same: AVX-512, AVX2 with FMA, and plain C. src/hadal/model/kernels/cpu.py calls this. */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define LANES 16
#define OUTPUTS 4 /* rows of the matrix at a time */
#define INPUTS 4  /* rows of x at a time */
#define TILE 128
#define BLOCK 32

enum format { FP8, FP8_FLOAT_SCALES, FP4 };
enum level { PLAIN, AVX2, AVX512 };

struct matrix {
    const uint8_t *codes;
    const void *scales;
    enum format format;
    long inner, outer;
};

static float power_of_two(uint8_t stored)
{
    return ldexpf(1.0f, (int)stored - 127);
}

/* The scale of a column of a row; it is the same up to the next multiple of TILE or BLOCK. */
static float scale_at(const struct matrix *m, long row, long column)
{
    if (m->format == FP4)
        return power_of_two(((const uint8_t *)m->scales)[row * (m->inner / BLOCK) + column / BLOCK]);
    long at = row / TILE * ((m->inner + TILE - 1) / TILE) + column / TILE;
    return m->format == FP8 ? power_of_two(((const uint8_t *)m->scales)[at]) : ((const float *)m->scales)[at];
}

static const float e2m1[16] = {0.0f, 0.5f, 1.0f, 1.5f, 2.0f, 3.0f, 4.0f, 6.0f, -0.0f, -0.5f, -1.0f, -1.5f, -2.0f, -3.0f, -4.0f, -6.0f};

static float e4m3(uint8_t code)
{
    int exponent = code >> 3 & 15, mantissa = code & 7;
    float value = exponent ? ldexpf(1.0f + (float)mantissa / 8.0f, exponent - 7) : ldexpf((float)mantissa, -9);
    if ((code & 0x7f) == 0x7f)
        value = NAN;
    return code & 0x80 ? -value : value;
}

static void unpack_plain(const struct matrix *m, long row, float *out)
{
    const uint8_t *codes = m->codes + row * (m->format == FP4 ? m->inner / 2 : m->inner);
    long step = m->format == FP4 ? BLOCK : TILE;
    for (long begin = 0; begin < m->inner; begin += step) {
        float scale = scale_at(m, row, begin);
        long end = begin + step < m->inner ? begin + step : m->inner;
        for (long i = begin; i < end; i++)
            out[i] = scale * (m->format == FP4 ? e2m1[codes[i / 2] >> (i & 1 ? 4 : 0) & 15] : e4m3(codes[i]));
    }
}

static float sum_of_lanes(float *lanes)
{
    for (int half = LANES / 2; half; half /= 2)
        for (int i = 0; i < half; i++)
            lanes[i] += lanes[i + half];
    return lanes[0];
}

/* Sums of `rows` rows of x with `outputs` unpacked rows, whose length is a multiple of LANES, as that of x. */
static void sums_plain(const float *x, long across, const float *w, long width, int rows, int outputs, float *y, long stride)
{
    for (int t = 0; t < rows; t++)
        for (int o = 0; o < outputs; o++) {
            float lanes[LANES] = {0};
            for (long i = 0; i < width; i++)
                lanes[i % LANES] += x[t * across + i] * w[o * width + i];
            y[t * stride + o] = sum_of_lanes(lanes);
        }
}

#ifdef __x86_64__
#include <immintrin.h>

#define V5 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,fma")))
#define V2 __attribute__((target("avx2,fma")))

V5 static inline __m512 e4m3_512(__m128i codes)
{
    __m512i wide = _mm512_cvtepu8_epi32(codes), magnitude = _mm512_and_epi32(wide, _mm512_set1_epi32(0x7f));
    __m512i normal = _mm512_add_epi32(_mm512_slli_epi32(magnitude, 20), _mm512_set1_epi32(120 << 23));
    __m512 small = _mm512_mul_ps(_mm512_cvtepi32_ps(magnitude), _mm512_set1_ps(0x1p-9f));
    __m512 value = _mm512_mask_blend_ps(_mm512_cmplt_epi32_mask(magnitude, _mm512_set1_epi32(8)), _mm512_castsi512_ps(normal), small);
    value = _mm512_mask_blend_ps(_mm512_cmpeq_epi32_mask(magnitude, _mm512_set1_epi32(0x7f)), value, _mm512_set1_ps(NAN));
    __m512i sign = _mm512_slli_epi32(_mm512_and_epi32(wide, _mm512_set1_epi32(0x80)), 24);
    return _mm512_castsi512_ps(_mm512_or_epi32(_mm512_castps_si512(value), sign));
}

V5 static void unpack_512(const struct matrix *m, long row, float *out)
{
    if (m->format == FP4) {
        const uint8_t *codes = m->codes + row * (m->inner / 2);
        __m512 table = _mm512_loadu_ps(e2m1);
        __m128i low = _mm_set1_epi8(15);
        for (long begin = 0; begin < m->inner; begin += BLOCK) {
            __m512 scale = _mm512_set1_ps(scale_at(m, row, begin));
            __m128i pairs = _mm_loadu_si128((const __m128i *)(codes + begin / 2));
            __m128i even = _mm_and_si128(pairs, low), odd = _mm_and_si128(_mm_srli_epi16(pairs, 4), low);
            __m512i first = _mm512_cvtepu8_epi32(_mm_unpacklo_epi8(even, odd));
            __m512i second = _mm512_cvtepu8_epi32(_mm_unpackhi_epi8(even, odd));
            _mm512_storeu_ps(out + begin, _mm512_mul_ps(scale, _mm512_permutexvar_ps(first, table)));
            _mm512_storeu_ps(out + begin + 16, _mm512_mul_ps(scale, _mm512_permutexvar_ps(second, table)));
        }
        return;
    }
    const uint8_t *codes = m->codes + row * m->inner;
    for (long begin = 0; begin < m->inner; begin += TILE) {
        __m512 scale = _mm512_set1_ps(scale_at(m, row, begin));
        long end = begin + TILE < m->inner ? begin + TILE : m->inner;
        for (long i = begin; i < end; i += 16) {
            __mmask16 there = end - i >= 16 ? 0xffff : (__mmask16)((1u << (end - i)) - 1);
            __m128i part = _mm_maskz_loadu_epi8(there, codes + i);
            _mm512_mask_storeu_ps(out + i, there, _mm512_mul_ps(scale, e4m3_512(part)));
        }
    }
}

V5 static inline float sum_512(__m512 v)
{
    __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

V5 static inline __attribute__((always_inline)) void tile_512(const float *x, long across, const float *w, long width, int rows, int outputs, float *y, long stride)
{
    __m512 sums[INPUTS][OUTPUTS];
    for (int t = 0; t < rows; t++)
        for (int o = 0; o < outputs; o++)
            sums[t][o] = _mm512_setzero_ps();
    for (long i = 0; i < width; i += LANES) {
        __m512 weights[OUTPUTS];
        for (int o = 0; o < outputs; o++)
            weights[o] = _mm512_loadu_ps(w + o * width + i);
        for (int t = 0; t < rows; t++) {
            __m512 inputs = _mm512_loadu_ps(x + t * across + i);
            for (int o = 0; o < outputs; o++)
                sums[t][o] = _mm512_fmadd_ps(inputs, weights[o], sums[t][o]);
        }
    }
    for (int t = 0; t < rows; t++)
        for (int o = 0; o < outputs; o++)
            y[t * stride + o] = sum_512(sums[t][o]);
}

V5 static void sums_512(const float *x, long across, const float *w, long width, int rows, int outputs, float *y, long stride)
{
    if (rows == INPUTS && outputs == OUTPUTS)
        tile_512(x, across, w, width, INPUTS, OUTPUTS, y, stride);
    else if (outputs == OUTPUTS)
        for (int t = 0; t < rows; t++)
            tile_512(x + t * across, across, w, width, 1, OUTPUTS, y + t * stride, stride);
    else
        for (int t = 0; t < rows; t++)
            for (int o = 0; o < outputs; o++)
                tile_512(x + t * across, across, w + o * width, width, 1, 1, y + t * stride + o, stride);
}

V2 static inline __m256 e4m3_256(__m128i codes)
{
    __m256i wide = _mm256_cvtepu8_epi32(codes), magnitude = _mm256_and_si256(wide, _mm256_set1_epi32(0x7f));
    __m256i normal = _mm256_add_epi32(_mm256_slli_epi32(magnitude, 20), _mm256_set1_epi32(120 << 23));
    __m256 small = _mm256_mul_ps(_mm256_cvtepi32_ps(magnitude), _mm256_set1_ps(0x1p-9f));
    __m256 is_small = _mm256_castsi256_ps(_mm256_cmpgt_epi32(_mm256_set1_epi32(8), magnitude));
    __m256 value = _mm256_blendv_ps(_mm256_castsi256_ps(normal), small, is_small);
    __m256 is_nan = _mm256_castsi256_ps(_mm256_cmpeq_epi32(magnitude, _mm256_set1_epi32(0x7f)));
    value = _mm256_blendv_ps(value, _mm256_set1_ps(NAN), is_nan);
    __m256i sign = _mm256_slli_epi32(_mm256_and_si256(wide, _mm256_set1_epi32(0x80)), 24);
    return _mm256_or_ps(value, _mm256_castsi256_ps(sign));
}

V2 static inline __m256 e2m1_256(__m128i codes)
{
    __m256i wide = _mm256_cvtepu8_epi32(codes);
    __m256 value = _mm256_permutevar8x32_ps(_mm256_loadu_ps(e2m1), wide); /* by the low three bits */
    __m256i sign = _mm256_slli_epi32(_mm256_and_si256(wide, _mm256_set1_epi32(8)), 28);
    return _mm256_or_ps(value, _mm256_castsi256_ps(sign));
}

V2 static void unpack_256(const struct matrix *m, long row, float *out)
{
    if (m->format != FP4 && m->inner % 8) {
        unpack_plain(m, row, out);
        return;
    }
    const uint8_t *codes = m->codes + row * (m->format == FP4 ? m->inner / 2 : m->inner);
    long step = m->format == FP4 ? BLOCK : TILE;
    __m128i low = _mm_set1_epi8(15);
    for (long begin = 0; begin < m->inner; begin += step) {
        __m256 scale = _mm256_set1_ps(scale_at(m, row, begin));
        long end = begin + step < m->inner ? begin + step : m->inner;
        for (long i = begin; i < end; i += 8) {
            __m256 value;
            if (m->format == FP4) {
                int32_t four;
                memcpy(&four, codes + i / 2, sizeof four);
                __m128i pairs = _mm_cvtsi32_si128(four);
                __m128i odd = _mm_and_si128(_mm_srli_epi16(pairs, 4), low);
                value = e2m1_256(_mm_unpacklo_epi8(_mm_and_si128(pairs, low), odd));
            } else {
                value = e4m3_256(_mm_loadl_epi64((const __m128i *)(codes + i)));
            }
            _mm256_storeu_ps(out + i, _mm256_mul_ps(scale, value));
        }
    }
}

V2 static inline float sum_256(__m256 first, __m256 second)
{
    __m256 eight = _mm256_add_ps(first, second);
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

V2 static void sums_256(const float *x, long across, const float *w, long width, int rows, int outputs, float *y, long stride)
{
    for (int t = 0; t < rows; t++)
        for (int o = 0; o < outputs; o += 2) {
            int pair = o + 1 < outputs; /* two at a time share what is loaded of x */
            const float *inputs = x + t * across, *one = w + o * width, *other = w + (o + pair) * width;
            __m256 sums[4] = {_mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps()};
            for (long i = 0; i < width; i += LANES) {
                __m256 a = _mm256_loadu_ps(inputs + i), b = _mm256_loadu_ps(inputs + i + 8);
                sums[0] = _mm256_fmadd_ps(a, _mm256_loadu_ps(one + i), sums[0]);
                sums[1] = _mm256_fmadd_ps(b, _mm256_loadu_ps(one + i + 8), sums[1]);
                sums[2] = _mm256_fmadd_ps(a, _mm256_loadu_ps(other + i), sums[2]);
                sums[3] = _mm256_fmadd_ps(b, _mm256_loadu_ps(other + i + 8), sums[3]);
            }
            y[t * stride + o] = sum_256(sums[0], sums[1]);
            if (pair)
                y[t * stride + o + 1] = sum_256(sums[2], sums[3]);
        }
}
#endif

/* What this processor can do: a value of enum level. */
int hadal_level(void)
{
#ifdef __x86_64__
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq"))
        return AVX512;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
        return AVX2;
#endif
    return PLAIN;
}

/* Outputs `first` up to `last` of y = x W^T. `x` has rows of `width` columns, `across` apart: the matrix's, and zeros up
 * to a multiple of LANES. 0, or -1 without memory. */
int hadal_stored_product(const float *x, long rows, long across, long width, const uint8_t *codes, const void *scales, int format, long inner,
                         long outer, long first, long last, float *y, int level)
{
    struct matrix m = {codes, scales, (enum format)format, inner, outer};
    void (*unpack)(const struct matrix *, long, float *) = unpack_plain;
    void (*sums)(const float *, long, const float *, long, int, int, float *, long) = sums_plain;
#ifdef __x86_64__
    if (level == AVX512)
        unpack = unpack_512, sums = sums_512;
    else if (level == AVX2)
        unpack = unpack_256, sums = sums_256;
#endif
    float *w = calloc((size_t)(OUTPUTS * width), sizeof *w);
    if (!w)
        return -1;
    for (long o = first; o < last; o += OUTPUTS) {
        int outputs = last - o < OUTPUTS ? (int)(last - o) : OUTPUTS;
        for (int n = 0; n < outputs; n++)
            unpack(&m, o + n, w + n * width);
        for (long t = 0; t < rows; t += INPUTS) {
            int some = rows - t < INPUTS ? (int)(rows - t) : INPUTS;
            sums(x + t * across, across, w, width, some, outputs, y + t * outer + o, outer);
        }
    }
    free(w);
    return 0;
}

/* To E4M3 and back, with a power of two as the scale of every TILE columns (spec/model.md 3.2). */
static float to_e4m3(float value)
{
    union { float f; uint32_t u; } bits = {value};
    if (fabsf(value) < 0x1p-6f)
        return rintf(value * 0x1p9f) * 0x1p-9f;
    bits.u = (bits.u + 0x7ffffu + (bits.u >> 20 & 1)) & ~0xfffffu;
    return bits.f;
}

/* Copy rows of `inner` columns into rows of `width`, the rest of which are zeros already, rounded if asked to. */
void hadal_round_inputs(const float *x, long rows, long inner, float *out, long width, int rounds)
{
    for (long t = 0; t < rows; t++)
        for (long begin = 0; begin < inner; begin += TILE) {
            long end = begin + TILE < inner ? begin + TILE : inner;
            const float *from = x + t * inner;
            float *to = out + t * width, most = 1e-4f;
            if (!rounds) {
                memcpy(to + begin, from + begin, (size_t)(end - begin) * sizeof *to);
                continue;
            }
            for (long i = begin; i < end; i++)
                most = !(fabsf(from[i]) <= most) ? fabsf(from[i]) : most; /* and a NaN stays one */
            int exponent;
            float mantissa = frexpf(most / 448.0f, &exponent);
            if (mantissa == 0.5f)
                exponent--;
            float scale = ldexpf(1.0f, exponent < -127 ? -127 : exponent > 127 ? 127 : exponent), inverse = 1.0f / scale;
            for (long i = begin; i < end; i++) {
                float scaled = from[i] * inverse;
                to[i] = scale * to_e4m3(scaled > 448.0f ? 448.0f : scaled < -448.0f ? -448.0f : scaled);
            }
        }
}
