/* Numbers of bfloat16, thirty-two at a time, whose products are summed in pairs as `vdpbf16ps` does it: lane j takes column
 * 2j + 1 and then 2j, each with one rounding. Where the processor has no such instruction, the odd columns lie before the
 * even ones as floats, and the bits are the same (but for sums below 2^-126, which the instruction takes for zero). */
#ifndef HADAL_PAIRS_H
#define HADAL_PAIRS_H

#include "matrix.h"

#define COLUMNS 32

#ifdef LEVEL_BF16

typedef __m512i pairs;
typedef uint16_t exact; /* what rows of pairs are kept as */
INLINE pairs pairs_load(const exact *p) { return _mm512_loadu_si512(p); }
INLINE void pairs_store(exact *p, pairs v) { _mm512_storeu_si512(p, v); }
INLINE v16 pairs_fma(pairs a, pairs b, v16 sum) { return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b); }
INLINE pairs pairs_of(v16 odd, v16 even)
{
    return _mm512_mask_blend_epi16(0xaaaaaaaa, _mm512_srli_epi32(_mm512_castps_si512(even), 16), _mm512_castps_si512(odd));
}
INLINE pairs pairs_of_bits(__m512i both) { return both; }

#else

typedef struct { v16 odd, even; } pairs;
typedef float exact;
INLINE pairs pairs_load(const exact *p) { return (pairs){v16_load(p), v16_load(p + LANES)}; }
INLINE void pairs_store(exact *p, pairs v) { v16_store(p, v.odd), v16_store(p + LANES, v.even); }
INLINE v16 pairs_fma(pairs a, pairs b, v16 sum) { return v16_fma(a.even, b.even, v16_fma(a.odd, b.odd, sum)); }
INLINE pairs pairs_of(v16 odd, v16 even) { return (pairs){odd, even}; }

#if defined LEVEL_AVX512
INLINE pairs pairs_of_bits(__m512i both)
{
    __m512i odd = _mm512_and_si512(both, _mm512_set1_epi32((int)0xffff0000));
    return pairs_of(_mm512_castsi512_ps(odd), _mm512_castsi512_ps(_mm512_slli_epi32(both, 16)));
}
#elif defined LEVEL_AVX2
INLINE pairs pairs_of_halves(const uint16_t *p)
{
    __m256i low = _mm256_loadu_si256((const __m256i *)p), high = _mm256_loadu_si256((const __m256i *)p + 1), mask = _mm256_set1_epi32((int)0xffff0000);
    v16 odd = {_mm256_castsi256_ps(_mm256_and_si256(low, mask)), _mm256_castsi256_ps(_mm256_and_si256(high, mask))};
    return pairs_of(odd, (v16){_mm256_castsi256_ps(_mm256_slli_epi32(low, 16)), _mm256_castsi256_ps(_mm256_slli_epi32(high, 16))});
}
#endif
#endif

#if defined LEVEL_AVX512
INLINE pairs pairs_of_halves(const uint16_t *p) { return pairs_of_bits(_mm512_loadu_si512(p)); }
INLINE pairs pairs_of_floats(const float *p)
{
    __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30), odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
    v16 low = v16_load(p), high = v16_load(p + LANES);
    return pairs_of(_mm512_permutex2var_ps(low, odd, high), _mm512_permutex2var_ps(low, even, high));
}
#elif defined LEVEL_AVX2
/* Every second of sixteen floats, from the first (0x88) or the second (0xdd). */
#define EVERY_SECOND(p, which)                                                                                           \
    _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(_mm256_shuffle_ps(_mm256_loadu_ps(p), _mm256_loadu_ps((p) + 8), which)), 0xd8))
INLINE pairs pairs_of_floats(const float *p)
{
    v16 odd = {EVERY_SECOND(p, 0xdd), EVERY_SECOND(p + LANES, 0xdd)};
    return pairs_of(odd, (v16){EVERY_SECOND(p, 0x88), EVERY_SECOND(p + LANES, 0x88)});
}
#endif

/* What codes are multiplied with, as it is needed for a span of columns that have one scale. */
#if defined LEVEL_AVX512

struct scaling {
    __m512i values, bias; /* FP4: all values; FP8: those of codes that are no normal numbers, and what makes an exponent of one */
    float factor;         /* of FP8 where exponents of bfloat16 would not do, or zero */
};

INLINE struct scaling scaling_of(enum format format, uint8_t scale)
{
    struct scaling s = {_mm512_setzero_si512(), _mm512_setzero_si512(), 0.0f};
    if (format == FP4) {
#ifdef LEVEL_BF16
        s.values = _mm512_broadcast_i64x4(_mm256_load_si256((const __m256i *)scaled_e2m1[scale]));
#else
        s.values = _mm512_load_si512(scaled_e2m1_floats[scale]);
#endif
    } else if (format == FP8) {
        s.values = _mm512_load_si512(scaled_special_e4m3[scale]);
        s.bias = _mm512_set1_epi16((short)((scale - 7) * 128));
        s.factor = scale < 8 || scale > 245 ? 0x1p8f * power_of_two(scale) : 0.0f;
    }
    return s;
}

/* A code chooses one of the sixteen values that there are with its scale. What lies above an index is not looked at. */
INLINE pairs pairs_of_fp4(const uint8_t *codes, const struct scaling *s)
{
    __m512i wide = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)codes));
#ifdef LEVEL_BF16
    return _mm512_permutexvar_epi16(_mm512_or_si512(wide, _mm512_slli_epi32(wide, 12)), s->values);
#else
    __m512 values = _mm512_castsi512_ps(s->values);
    return pairs_of(_mm512_permutexvar_ps(_mm512_srli_epi32(wide, 4), values), _mm512_permutexvar_ps(wide, values));
#endif
}

/* Bits of normal numbers are moved into place; denormal ones and NaN, the rest, are looked up by their last bits. */
INLINE pairs pairs_of_fp8(const uint8_t *codes, const struct scaling *s)
{
    __m256i both = _mm256_loadu_si256((const __m256i *)codes);
    if (__builtin_expect(s->factor != 0.0f, 0))
        return pairs_of(v16_mul(v16_all(s->factor), v16_reduced_words(_mm256_srli_epi16(both, 8))),
                        v16_mul(v16_all(s->factor), v16_reduced_words(_mm256_and_si256(both, _mm256_set1_epi16(0xff)))));
    __m512i wide = _mm512_cvtepu8_epi16(both), magnitude = _mm512_and_si512(wide, _mm512_set1_epi16(0x7f));
    __m512i bits = _mm512_add_epi16(_mm512_slli_epi16(magnitude, 4), s->bias);
    __mmask32 special = _mm512_cmpge_epu16_mask(_mm512_sub_epi16(magnitude, _mm512_set1_epi16(8)), _mm512_set1_epi16(0x7f - 8));
    bits = _mm512_mask_permutexvar_epi16(bits, special, magnitude, s->values);
    __m512i sign = _mm512_and_si512(_mm512_slli_epi16(wide, 8), _mm512_set1_epi16((short)0x8000));
    return pairs_of_bits(_mm512_or_si512(bits, sign));
}

#else

struct scaling { float factor; };
INLINE struct scaling scaling_of(enum format format, uint8_t scale)
{
    return (struct scaling){format == BFLOAT16 ? 1.0f : power_of_two(scale)};
}

#ifdef LEVEL_AVX2
INLINE pairs pairs_of_fp4(const uint8_t *codes, const struct scaling *s)
{
    __m128i low = _mm_set1_epi8(15), both = _mm_loadu_si128((const __m128i *)codes), table = doubled_values();
    v16 half = v16_all(0.5f * s->factor);
    return pairs_of(v16_mul(half, v16_bytes(_mm_shuffle_epi8(table, _mm_and_si128(_mm_srli_epi16(both, 4), low)))),
                    v16_mul(half, v16_bytes(_mm_shuffle_epi8(table, _mm_and_si128(both, low)))));
}
INLINE pairs pairs_of_fp8(const uint8_t *codes, const struct scaling *s)
{
    __m256i both = _mm256_loadu_si256((const __m256i *)codes);
    v16 factor = v16_all(0x1p8f * s->factor);
    return pairs_of(v16_mul(factor, v16_reduced_words(_mm256_srli_epi16(both, 8))),
                    v16_mul(factor, v16_reduced_words(_mm256_and_si256(both, _mm256_set1_epi16(0xff)))));
}
#else
INLINE pairs pairs_of_floats(const float *p)
{
    pairs v;
    for (int i = 0; i < LANES; i++)
        v.odd.lane[i] = p[2 * i + 1], v.even.lane[i] = p[2 * i];
    return v;
}
INLINE pairs pairs_of_halves(const uint16_t *p)
{
    float floats[COLUMNS];
    load_row(p, 1, COLUMNS, floats);
    return pairs_of_floats(floats);
}
INLINE pairs pairs_of_fp8(const uint8_t *codes, const struct scaling *s)
{
    float floats[COLUMNS];
    unpack_tile(codes, s->factor, COLUMNS, floats);
    return pairs_of_floats(floats);
}
INLINE pairs pairs_of_fp4(const uint8_t *codes, const struct scaling *s)
{
    float floats[COLUMNS];
    unpack_block(codes, s->factor, floats);
    return pairs_of_floats(floats);
}
#endif
#endif

/* Whether products with a matrix are summed so: where both sides are numbers of bfloat16. */
INLINE int is_exact(const struct matrix *m, int halves)
{
    return halves && (m->format == BFLOAT16 || m->format == FP8 || m->format == FP4);
}

INLINE pairs pairs_of_codes(enum format format, const void *at, const struct scaling *s)
{
    return format == BFLOAT16 ? pairs_of_halves(at) : format == FP4 ? pairs_of_fp4(at, s) : pairs_of_fp8(at, s);
}

#endif
