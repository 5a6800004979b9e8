/* Sixteen floats at the level that a file is compiled for, and what is done with them.
 *
 * A sum over columns is sixteen partial sums, of the columns i, i+16, i+32, ... (pairs.h has another order), added in pairs
 * at the end, at every level; so AVX2 and AVX-512 have the same bits. Only `v16_fma` and `pairs_fma` fuse a multiplication
 * with an addition (on a processor that can); all else is compiled so that the compiler fuses none. */
#ifndef HADAL_SIMD_H
#define HADAL_SIMD_H

#include <math.h>
#include <stdint.h>
#include <string.h>

#define LANES 16
#define INLINE static inline __attribute__((always_inline))

#if defined LEVEL_AVX512

#include <immintrin.h>
#define ROWS 4 /* of a tile: vectors that stay in registers while the columns pass */
#define OUTPUTS 4
typedef __m512 v16;
INLINE v16 v16_load(const float *p) { return _mm512_loadu_ps(p); }
INLINE void v16_store(float *p, v16 v) { _mm512_storeu_ps(p, v); }
INLINE v16 v16_all(float x) { return _mm512_set1_ps(x); }
INLINE v16 v16_fma(v16 a, v16 b, v16 c) { return _mm512_fmadd_ps(a, b, c); }
INLINE v16 v16_mul(v16 a, v16 b) { return _mm512_mul_ps(a, b); }
INLINE v16 v16_add(v16 a, v16 b) { return _mm512_add_ps(a, b); }
INLINE v16 v16_halves(const uint16_t *p)
{
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p)), 16));
}
INLINE float v16_sum(v16 v)
{
    __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

#elif defined LEVEL_AVX2

#include <immintrin.h>
#define ROWS 3
#define OUTPUTS 2
typedef struct { __m256 low, high; } v16;
INLINE v16 v16_load(const float *p) { return (v16){_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
INLINE void v16_store(float *p, v16 v) { _mm256_storeu_ps(p, v.low), _mm256_storeu_ps(p + 8, v.high); }
INLINE v16 v16_all(float x) { return (v16){_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
INLINE v16 v16_fma(v16 a, v16 b, v16 c) { return (v16){_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)}; }
INLINE v16 v16_mul(v16 a, v16 b) { return (v16){_mm256_mul_ps(a.low, b.low), _mm256_mul_ps(a.high, b.high)}; }
INLINE v16 v16_add(v16 a, v16 b) { return (v16){_mm256_add_ps(a.low, b.low), _mm256_add_ps(a.high, b.high)}; }
INLINE __m256 eight_halves(const uint16_t *p)
{
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p)), 16));
}
INLINE v16 v16_halves(const uint16_t *p) { return (v16){eight_halves(p), eight_halves(p + 8)}; }
INLINE float v16_sum(v16 v)
{
    __m256 eight = _mm256_add_ps(v.low, v.high);
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

#else

#define ROWS 2
#define OUTPUTS 2
typedef struct { float lane[LANES]; } v16;
INLINE v16 v16_load(const float *p) { v16 v; memcpy(&v, p, sizeof v); return v; }
INLINE void v16_store(float *p, v16 v) { memcpy(p, &v, sizeof v); }
INLINE v16 v16_all(float x) { v16 v; for (int i = 0; i < LANES; i++) v.lane[i] = x; return v; }
INLINE v16 v16_mul(v16 a, v16 b) { for (int i = 0; i < LANES; i++) a.lane[i] *= b.lane[i]; return a; }
INLINE v16 v16_add(v16 a, v16 b) { for (int i = 0; i < LANES; i++) a.lane[i] += b.lane[i]; return a; }
INLINE v16 v16_halves(const uint16_t *p)
{
    v16 v;
    for (int i = 0; i < LANES; i++) {
        uint32_t bits = (uint32_t)p[i] << 16;
        memcpy(&v.lane[i], &bits, sizeof bits);
    }
    return v;
}
INLINE v16 v16_fma(v16 a, v16 b, v16 c) { for (int i = 0; i < LANES; i++) c.lane[i] += a.lane[i] * b.lane[i]; return c; }
INLINE float v16_sum(v16 v)
{
    for (int half = LANES / 2; half; half /= 2)
        for (int i = 0; i < half; i++)
            v.lane[i] += v.lane[i + half];
    return v.lane[0];
}

#endif

INLINE float widened(uint16_t half)
{
    union { uint32_t u; float f; } bits = {(uint32_t)half << 16};
    return bits.f;
}

INLINE uint16_t narrowed(float value)
{
    union { float f; uint32_t u; } bits = {value};
    uint16_t rounded = (uint16_t)((bits.u + 0x7fffu + (bits.u >> 16 & 1)) >> 16);
    return value != value ? 0x7fc0 : rounded;
}

#if defined LEVEL_AVX512
/* The bits of bfloat16 above sixteen others, of which nothing is said. */
INLINE __m512i half_bits(v16 v)
{
    __m512i bits = _mm512_castps_si512(v), odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
    return _mm512_mask_mov_epi32(rounded, _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), _mm512_set1_epi32(0x7fc00000));
}
INLINE v16 v16_rounded_halves(v16 v) { return _mm512_castsi512_ps(_mm512_and_si512(half_bits(v), _mm512_set1_epi32((int)0xffff0000))); }
INLINE void v16_store_halves(uint16_t *p, v16 v) { _mm256_storeu_si256((__m256i *)p, _mm512_cvtepi32_epi16(_mm512_srli_epi32(half_bits(v), 16))); }
#elif defined LEVEL_AVX2
INLINE __m256i half_bits(__m256 v)
{
    __m256i bits = _mm256_castps_si256(v), odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
    return _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc00000), _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q)));
}
INLINE v16 v16_rounded_halves(v16 v)
{
    __m256i mask = _mm256_set1_epi32((int)0xffff0000);
    return (v16){_mm256_castsi256_ps(_mm256_and_si256(half_bits(v.low), mask)), _mm256_castsi256_ps(_mm256_and_si256(half_bits(v.high), mask))};
}
INLINE void v16_store_halves(uint16_t *p, v16 v)
{
    __m256i both = _mm256_packus_epi32(_mm256_srli_epi32(half_bits(v.low), 16), _mm256_srli_epi32(half_bits(v.high), 16));
    _mm256_storeu_si256((__m256i *)p, _mm256_permute4x64_epi64(both, 0xd8));
}
#else
INLINE v16 v16_rounded_halves(v16 v)
{
    for (int i = 0; i < LANES; i++)
        v.lane[i] = widened(narrowed(v.lane[i]));
    return v;
}
INLINE void v16_store_halves(uint16_t *p, v16 v)
{
    for (int i = 0; i < LANES; i++)
        p[i] = narrowed(v.lane[i]);
}
#endif

/* As bfloat16 holds it. */
INLINE float rounded_half(float value) { return widened(narrowed(value)); }

/* Copy numbers from or to a tensor of bfloat16 (halves) or float32. */
INLINE void load_row(const void *from, int halves, long count, float *to)
{
    if (!halves)
        memcpy(to, from, (size_t)count * sizeof *to);
    else
        for (long i = 0; i < count; i++)
            to[i] = widened(((const uint16_t *)from)[i]);
}

INLINE void store_row(const float *from, long count, void *to, int halves)
{
    if (!halves) {
        memcpy(to, from, (size_t)count * sizeof *from);
        return;
    }
    long i = 0;
    for (; i + LANES <= count; i += LANES)
        v16_store_halves((uint16_t *)to + i, v16_load(from + i));
    for (; i < count; i++)
        ((uint16_t *)to)[i] = narrowed(from[i]);
}

INLINE void round_halves(float *x, long count, int halves)
{
    long i = 0;
    for (; halves && i + LANES <= count; i += LANES)
        v16_store(x + i, v16_rounded_halves(v16_load(x + i)));
    for (; halves && i < count; i++)
        x[i] = rounded_half(x[i]);
}

INLINE const void *row_of(const void *tensor, long row, long width, int halves)
{
    return (const char *)tensor + row * width * (halves ? 2 : 4);
}

/* e^x within two units in the last place; written without branches, so that loops of it are vectors. */
INLINE float exponential(float x)
{
    float least = x < -87.3f ? -87.3f : x, given = least > 88.7f ? 88.7f : least;
    union { float f; int32_t i; } whole = {given * 1.44269504f + 12582912.0f}, power;
    float n = whole.f - 12582912.0f, r = (given - n * 0.693359375f) + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    power.i = (int32_t)((uint32_t)(whole.i - 0x4b400000 + 127) << 23);
    float value = (p * (r * r) + r + 1.0f) * power.f;
    return x < -87.3f ? 0.0f : x != x ? x : value;
}

INLINE float sigmoid(float x)
{
    float least = x < -80.0f ? -80.0f : x; /* as in model/elementwise.py */
    return 1.0f / (1.0f + exponential(-least));
}

#endif
