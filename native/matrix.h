/* Matrices as checkpoints store them: FP8 E4M3 in tiles of 128x128, FP4 E2M1 in blocks of 32, bfloat16 and float32. */
#ifndef HADAL_MATRIX_H
#define HADAL_MATRIX_H

#include "simd.h"

#define TILE 128
#define BLOCK 32

enum format { FLOAT32, BFLOAT16, FP8, FP8_FLOAT_SCALES, FP4 };

struct matrix {
    const void *codes, *scales;
    enum format format;
    long inner, outer;
};

/* 2^(stored - 127). */
INLINE float power_of_two(uint8_t stored)
{
    union { uint32_t u; float f; } bits = {(uint32_t)stored << 23 | (uint32_t)(stored == 0) << 22};
    return bits.f;
}

/* What is stored for a power of two. */
INLINE uint8_t power_byte(float scale)
{
    union { float f; uint32_t u; } bits = {scale};
    return (uint8_t)(bits.u >> 23);
}

extern uint16_t scaled_e2m1[256][16];         /* every value with every scale, as bfloat16, and */
extern float scaled_e2m1_floats[256][16];     /* as floats */
extern uint16_t scaled_special_e4m3[256][32]; /* of E4M3 the denormal ones, and NaN as the last */
static const float e2m1[16] = {0.0f, 0.5f, 1.0f, 1.5f, 2.0f, 3.0f, 4.0f, 6.0f, -0.0f, -0.5f, -1.0f, -1.5f, -2.0f, -3.0f, -4.0f, -6.0f};

/* By bits, without branches, so that loops of it are vectors. */
INLINE float e4m3(uint8_t code)
{
    uint32_t magnitude = code & 0x7f, sign = (uint32_t)(code & 0x80) << 24;
    union { uint32_t u; float f; } normal = {(magnitude << 20) + (120u << 23)}, small = {.f = (float)(int)magnitude * 0x1p-9f};
    uint32_t bits = magnitude < 8 ? small.u : normal.u;
    union { uint32_t u; float f; } value = {(magnitude == 0x7f ? 0x7fc00000u : bits) | sign};
    return value.f;
}

#if defined LEVEL_AVX2 || defined LEVEL_AVX512

/* The values of E2M1, doubled, which are whole. */
INLINE __m128i doubled_values(void) { return _mm_setr_epi8(0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12); }

/* Thirty-two FP4 codes in order, one to a byte, as the bytes of their doubled values. */
INLINE __m256i doubled_e2m1(const uint8_t *codes)
{
    __m128i low = _mm_set1_epi8(15), pairs = _mm_loadu_si128((const __m128i *)codes);
    __m128i even = _mm_and_si128(pairs, low), odd = _mm_and_si128(_mm_srli_epi16(pairs, 4), low);
    return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(doubled_values()), _mm256_set_m128i(_mm_unpackhi_epi8(even, odd), _mm_unpacklo_epi8(even, odd)));
}

/* Half of a block of doubled FP4 codes as floats. */
INLINE v16 v16_bytes(__m128i bytes)
{
#ifdef LEVEL_AVX512
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes));
#else
    return (v16){_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes)), _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(bytes, 8)))};
#endif
}

INLINE void doubled_block(const uint8_t *codes, v16 *first, v16 *second)
{
    __m256i bytes = doubled_e2m1(codes);
    *first = v16_bytes(_mm256_castsi256_si128(bytes));
    *second = v16_bytes(_mm256_extracti128_si256(bytes, 1));
}

INLINE void unpack_block(const uint8_t *codes, float scale, float *out)
{
    v16 first, second, half = v16_all(0.5f * scale);
    doubled_block(codes, &first, &second);
    v16_store(out, v16_mul(half, first));
    v16_store(out + LANES, v16_mul(half, second));
}

/* Sixteen codes of E4M3, one to a word, as floats, divided by 2^8: as half floats their exponents are too small by eight. */
INLINE v16 v16_reduced_words(__m256i wide)
{
    __m256i all = _mm256_set1_epi16(0x7f), is_nan = _mm256_cmpeq_epi16(_mm256_and_si256(wide, all), all);
    __m256i placed = _mm256_slli_epi16(wide, 7), sign = _mm256_and_si256(placed, _mm256_set1_epi16(0x4000)); /* one too low */
    __m256i halves = _mm256_or_si256(_mm256_add_epi16(placed, sign), _mm256_and_si256(is_nan, _mm256_set1_epi16(0x7e00)));
#ifdef LEVEL_AVX512
    return _mm512_cvtph_ps(halves);
#else
    return (v16){_mm256_cvtph_ps(_mm256_castsi256_si128(halves)), _mm256_cvtph_ps(_mm256_extracti128_si256(halves, 1))};
#endif
}

INLINE v16 v16_reduced_e4m3(const uint8_t *codes)
{
    return v16_reduced_words(_mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i *)codes)));
}

INLINE void unpack_tile(const uint8_t *codes, float scale, long count, float *out)
{
    long i = 0;
    for (; i + LANES <= count; i += LANES)
        v16_store(out + i, v16_mul(v16_all(scale * 0x1p8f), v16_reduced_e4m3(codes + i)));
    for (; i < count; i++)
        out[i] = scale * e4m3(codes[i]);
}

#else

INLINE void doubled_block(const uint8_t *codes, v16 *first, v16 *second)
{
    for (int i = 0; i < BLOCK; i++)
        (i < LANES ? first : second)->lane[i % LANES] = 2.0f * e2m1[codes[i / 2] >> (i & 1 ? 4 : 0) & 15];
}

INLINE v16 v16_reduced_e4m3(const uint8_t *codes)
{
    v16 v;
    for (int i = 0; i < LANES; i++)
        v.lane[i] = 0x1p-8f * e4m3(codes[i]);
    return v;
}

INLINE void unpack_tile(const uint8_t *codes, float scale, long count, float *out)
{
    for (long i = 0; i < count; i++)
        out[i] = scale * e4m3(codes[i]);
}

INLINE void unpack_block(const uint8_t *codes, float scale, float *out)
{
    for (int i = 0; i < BLOCK; i++)
        out[i] = scale * e2m1[codes[i / 2] >> (i & 1 ? 4 : 0) & 15];
}

#endif

/* A row as floats. */
INLINE void unpack_row(const struct matrix *m, long row, float *out)
{
    if (m->format == FLOAT32) {
        memcpy(out, (const float *)m->codes + row * m->inner, (size_t)m->inner * sizeof *out);
    } else if (m->format == BFLOAT16) {
        load_row((const uint16_t *)m->codes + row * m->inner, 1, m->inner, out);
    } else if (m->format == FP4) {
        const uint8_t *codes = (const uint8_t *)m->codes + row * (m->inner / 2);
        const uint8_t *scales = (const uint8_t *)m->scales + row * (m->inner / BLOCK);
        for (long n = 0; n < m->inner / BLOCK; n++)
            unpack_block(codes + n * BLOCK / 2, power_of_two(scales[n]), out + n * BLOCK);
    } else {
        const uint8_t *codes = (const uint8_t *)m->codes + row * m->inner;
        long tiles = (m->inner + TILE - 1) / TILE, at = row / TILE * tiles;
        for (long n = 0; n < tiles; n++) {
            float scale = m->format == FP8 ? power_of_two(((const uint8_t *)m->scales)[at + n]) : ((const float *)m->scales)[at + n];
            long end = (n + 1) * TILE < m->inner ? (n + 1) * TILE : m->inner;
            unpack_tile(codes + n * TILE, scale, end - n * TILE, out + n * TILE);
        }
    }
}

INLINE long bits_of(enum format format)
{
    return format == FLOAT32 ? 32 : format == BFLOAT16 ? 16 : format == FP4 ? 4 : 8;
}

/* Two times LANES numbers as floats, but for their scale; LANES where `both` is 0. `format` is a constant where this is called. */
INLINE void two_codes(enum format format, const char *at, int both, v16 *codes)
{
    if (format == FP4) {
        doubled_block((const uint8_t *)at, codes, codes + 1);
        return;
    }
    for (int n = 0; n < 1 + both; n++, at += LANES * bits_of(format) / 8)
        codes[n] = format == FLOAT32 ? v16_load((const float *)at)
                   : format == BFLOAT16 ? v16_halves((const uint16_t *)at)
                                        : v16_reduced_e4m3((const uint8_t *)at);
}

/* To E4M3 and back. */
INLINE float to_e4m3(float value)
{
    union { float f; uint32_t u; } bits = {value};
    float small = (value * 0x1p9f + 12582912.0f - 12582912.0f) * 0x1p-9f;
    bits.u = (bits.u + 0x7ffffu + (bits.u >> 20 & 1)) & ~0xfffffu;
    return fabsf(value) < 0x1p-6f ? small : bits.f;
}

/* The smallest power of two that `most` is at most `largest` times of (spec/model.md 3.2). */
INLINE float power_reaching(float most, float largest)
{
    int exponent;
    float mantissa = frexpf(most / largest, &exponent);
    if (mantissa == 0.5f)
        exponent--;
    return ldexpf(1.0f, exponent < -127 ? -127 : exponent > 127 ? 127 : exponent);
}

INLINE float e4m3_scale(const float *x, long count)
{
    float most = 1e-4f;
    for (long i = 0; i < count; i++)
        most = !(fabsf(x[i]) <= most) ? fabsf(x[i]) : most; /* and a NaN stays one */
    return power_reaching(most, 448.0f);
}

/* A number divided by its block's scale, as E4M3 has it. */
INLINE float e4m3_value(float scaled) { return to_e4m3(scaled > 448.0f ? 448.0f : scaled < -448.0f ? -448.0f : scaled); }

/* Of a number that E4M3 has. */
INLINE uint8_t e4m3_code(float value)
{
    union { float f; uint32_t u; } bits = {fabsf(value)};
    uint32_t code = bits.f < 0x1p-6f ? (uint32_t)(bits.f * 0x1p9f) : bits.f <= 448.0f ? (bits.u - (120u << 23)) >> 20 : 0x7f;
    return (uint8_t)(code | (signbit(value) ? 0x80u : 0u));
}

/* Round a block to E4M3 and back. */
INLINE void round_block(float *x, long count)
{
    float scale = e4m3_scale(x, count), inverse = 1.0f / scale;
    for (long i = 0; i < count; i++)
        x[i] = scale * e4m3_value(x[i] * inverse);
}

INLINE void round_row(float *x, long count, long block)
{
    for (long begin = 0; begin < count; begin += block)
        round_block(x + begin, count - begin < block ? count - begin : block);
}

/* The scale of a block of FP4. */
INLINE float e2m1_scale(const float *x)
{
    float most = 6.0f * 0x1p-126f;
    for (long i = 0; i < BLOCK; i++)
        most = fabsf(x[i]) > most ? fabsf(x[i]) : most;
    return power_reaching(most, 6.0f);
}

/* A number divided by its block's scale, as E2M1 has it; ties go to the even code. */
INLINE float e2m1_value(float scaled)
{
    float size = fabsf(scaled) > 6.0f ? 6.0f : fabsf(scaled), step = size < 2.0f ? 0.5f : size < 4.0f ? 1.0f : 2.0f;
    return copysignf((size / step + 12582912.0f - 12582912.0f) * step, scaled);
}

/* Of a number that E2M1 has. */
INLINE uint8_t e2m1_code(float value)
{
    float size = fabsf(value);
    int code = (int)(size < 2.0f ? 2.0f * size : size < 4.0f ? size + 2.0f : size / 2.0f + 4.0f);
    return (uint8_t)(code | (signbit(value) ? 8 : 0));
}

/* Round a row to FP4 and back. */
INLINE void round_to_e2m1(float *x, long width)
{
    for (long begin = 0; begin < width; begin += BLOCK) {
        float scale = e2m1_scale(x + begin), inverse = 1.0f / scale;
        for (long i = begin; i < begin + BLOCK; i++)
            x[i] = scale * e2m1_value(x[i] * inverse);
    }
}

#endif
