/* The lightning indexer: scores of the entries for each query, and the best of them (spec/model.md 2.8).
 *
 * A score is a sum over heads in order, each a sum over columns in order. Equal scores go to the lowest index. */
#include "store.h"
#include <stdatomic.h>

#define SPAN (LANES * OUTPUTS) /* index keys whose products stay in registers */
#define SPANS_AT_ONCE 8
#define MOST_SCORES (4l << 20) /* floats of a group of queries */
#define BUCKETS 2048

struct choice {
    const void *q; /* [T, I, K] */
    const void *weight; /* [T, I] */
    int halves;
    long tokens, heads, width;
    const struct store *keys;
    const int64_t *visible; /* [T] */
    long k, columns;        /* of `index`: k, or all entries there are */
    int in_halves;          /* products, terms and scores rounded to bfloat16 */
    int64_t *index;         /* [T, columns], ascending, zeros where there are fewer */
    long begin, queries, across;
    float *folded, *signs, *scores; /* of a group of queries: [queries, I, K], [queries, I], [queries, across] */
    atomic_int failed;
};

/* The weight is folded into the query, w relu(q . k) = sign(w) relu(|w| q . k); where terms are rounded it is not. */
INLINE void fold(const struct choice *c, long n)
{
    long t = c->begin + n;
    float *query = c->folded + n * c->heads * c->width, *sign = c->signs + n * c->heads;
    load_row(row_of(c->q, t, c->heads * c->width, c->halves), c->halves, c->heads * c->width, query);
    load_row(row_of(c->weight, t, c->heads, c->halves), c->halves, c->heads, sign);
    round_halves(query, c->heads * c->width, c->in_halves);
    round_halves(sign, c->heads, c->in_halves);
    for (long h = 0; h < c->heads && !c->in_halves; h++) {
        for (long i = 0; i < c->width; i++)
            query[h * c->width + i] *= fabsf(sign[h]);
        sign[h] = sign[h] > 0.0f ? 1.0f : sign[h] < 0.0f ? -1.0f : sign[h];
    }
}

/* Products of some heads' queries with a span of keys, whose columns lie one after another in `across`. */
INLINE void span_products(const float *query, const float *across, long width, int heads, float *out)
{
    v16 sums[ROWS][OUTPUTS];
    for (int h = 0; h < heads; h++)
        for (int o = 0; o < OUTPUTS; o++)
            sums[h][o] = v16_all(0.0f);
    for (long i = 0; i < width; i++)
        for (int o = 0; o < OUTPUTS; o++) {
            v16 key = v16_load(across + i * SPAN + o * LANES);
            for (int h = 0; h < heads; h++)
                sums[h][o] = v16_fma(v16_all(query[h * width + i]), key, sums[h][o]);
        }
    for (int h = 0; h < heads; h++)
        for (int o = 0; o < OUTPUTS; o++)
            v16_store(out + h * SPAN + o * LANES, sums[h][o]);
}

INLINE void add_head(const float *products, float sign, int in_halves, float *scores)
{
    for (int n = 0; n < SPAN; n++) {
        float positive = products[n] < 0.0f ? 0.0f : products[n];
        if (in_halves)
            scores[n] += rounded_half(sign * rounded_half(positive));
        else
            scores[n] += sign * positive;
    }
}

INLINE void score_span(const struct choice *c, long n, const float *across, float *scores)
{
    float products[ROWS * SPAN];
    const float *query = c->folded + n * c->heads * c->width, *sign = c->signs + n * c->heads;
    memset(scores, 0, SPAN * sizeof *scores);
    for (long h = 0; h < c->heads; h += ROWS) {
        int few = c->heads - h < ROWS ? (int)(c->heads - h) : ROWS;
        if (few == ROWS)
            span_products(query + h * c->width, across, c->width, ROWS, products);
        else
            for (int one = 0; one < few; one++)
                span_products(query + (h + one) * c->width, across, c->width, 1, products + one * SPAN);
        for (int one = 0; one < few; one++)
            add_head(products + one * SPAN, sign[h + one], c->in_halves, scores);
    }
    round_halves(scores, SPAN, c->in_halves);
}

INLINE float number_of(const void *row, int halves, long i) { return halves ? widened(((const uint16_t *)row)[i]) : ((const float *)row)[i]; }

#if defined LEVEL_AVX512
#define TURNED 16
INLINE __m512d doubles(v16 v) { return _mm512_castps_pd(v); }

/* Sixteen columns of sixteen rows. */
INLINE void turn_square(const void *const *rows, int halves, long i, float *out)
{
    v16 r[16], s[16];
#pragma GCC unroll 16
    for (int n = 0; n < 16; n++)
        r[n] = halves ? v16_halves((const uint16_t *)rows[n] + i) : v16_load((const float *)rows[n] + i);
#pragma GCC unroll 8
    for (int n = 0; n < 16; n += 2) {
        s[n] = _mm512_unpacklo_ps(r[n], r[n + 1]);
        s[n + 1] = _mm512_unpackhi_ps(r[n], r[n + 1]);
    }
#pragma GCC unroll 8
    for (int n = 0; n < 16; n += 2) {
        int from = n / 4 * 4 + n % 4 / 2; /* of four rows, the columns n % 4 and n % 4 + 1 of every four */
        r[n] = _mm512_castpd_ps(_mm512_unpacklo_pd(doubles(s[from]), doubles(s[from + 2])));
        r[n + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(doubles(s[from]), doubles(s[from + 2])));
    }
#pragma GCC unroll 4
    for (int n = 0; n < 4; n++) {
        v16 even[2], odd[2];
#pragma GCC unroll 2
        for (int half = 0; half < 2; half++) {
            even[half] = _mm512_shuffle_f32x4(r[8 * half + n], r[8 * half + 4 + n], 0x88);
            odd[half] = _mm512_shuffle_f32x4(r[8 * half + n], r[8 * half + 4 + n], 0xdd);
        }
        v16_store(out + (i + n) * SPAN, _mm512_shuffle_f32x4(even[0], even[1], 0x88));
        v16_store(out + (i + n + 4) * SPAN, _mm512_shuffle_f32x4(odd[0], odd[1], 0x88));
        v16_store(out + (i + n + 8) * SPAN, _mm512_shuffle_f32x4(even[0], even[1], 0xdd));
        v16_store(out + (i + n + 12) * SPAN, _mm512_shuffle_f32x4(odd[0], odd[1], 0xdd));
    }
}
#elif defined LEVEL_AVX2
#define TURNED 8
/* Eight columns of eight rows. */
INLINE void turn_square(const void *const *rows, int halves, long i, float *out)
{
    __m256 r[8], s[8], t[8];
    for (int n = 0; n < 8; n++)
        r[n] = halves ? eight_halves((const uint16_t *)rows[n] + i) : _mm256_loadu_ps((const float *)rows[n] + i);
    for (int n = 0; n < 8; n += 2) {
        s[n] = _mm256_unpacklo_ps(r[n], r[n + 1]);
        s[n + 1] = _mm256_unpackhi_ps(r[n], r[n + 1]);
    }
    for (int n = 0; n < 8; n += 4)
        for (int m = 0; m < 2; m++) {
            t[n + 2 * m] = _mm256_shuffle_ps(s[n + m], s[n + 2 + m], 0x44);
            t[n + 2 * m + 1] = _mm256_shuffle_ps(s[n + m], s[n + 2 + m], 0xee);
        }
    for (int n = 0; n < 4; n++) {
        _mm256_storeu_ps(out + (i + n) * SPAN, _mm256_permute2f128_ps(t[n], t[n + 4], 0x20));
        _mm256_storeu_ps(out + (i + n + 4) * SPAN, _mm256_permute2f128_ps(t[n], t[n + 4], 0x31));
    }
}
#endif

/* Keys beside each other: out[i * SPAN + o] = key[o][i]. */
INLINE void turn(const void *const *key, int halves, long width, float *out)
{
    long i = 0;
#ifdef TURNED
    for (; i + TURNED <= width; i += TURNED)
        for (long o = 0; o < SPAN; o += TURNED)
            turn_square(key + o, halves, i, out + o);
#endif
    for (; i < width; i++)
        for (long o = 0; o < SPAN; o++)
            out[i * SPAN + o] = number_of(key[o], halves, i);
}

/* Keys of a span, `there` of them at most, come into the second cache while others are multiplied. */
INLINE void fetch_span(const struct store *keys, long first, long there)
{
    struct walk walk = {.store = keys, .row = first};
    for (long o = 0; o < SPAN && o < there; o++) {
        const char *at = next_row(&walk);
        for (long i = 0; i < keys->row_bytes; i += 64)
            __builtin_prefetch(at + i, 0, 2);
    }
}

/* Keys of a span, `there` of them, beside each other; zeros where there are fewer. */
INLINE void take_span(const struct choice *c, long first, long there, float *room, float *across)
{
    const struct store *keys = c->keys;
    struct walk walk = {.store = keys, .row = first};
    const void *key[SPAN];
    int halves = keys->packing == AS_HALVES;
    for (long o = 0; o < SPAN; o++) {
        float *own = room + o * c->width;
        const char *at = o < there ? next_row(&walk) : memset(own, 0, (size_t)c->width * sizeof *own);
        key[o] = o >= there || halves ? at : (const char *)row_at(keys, at, own);
        if (c->in_halves && !halves && o < there) {
            if (key[o] != own)
                key[o] = memcpy(own, key[o], (size_t)c->width * sizeof *own);
            round_halves(own, c->width, 1);
        }
    }
    if (halves)
        turn(key, 1, c->width, across);
    else
        turn(key, 0, c->width, across);
}

/* Some keys by all queries of the group that see them. */
static void scores_part(void *context, long part)
{
    struct choice *c = context;
    float *room = room_of(ROWS_ROOM, (size_t)(2 * SPAN * c->width) * sizeof *room), *across = room + SPAN * c->width;
    if (!room) {
        atomic_store(&c->failed, 1);
        return;
    }
    long last = c->visible[c->begin + c->queries - 1];
    for (long first = part * SPANS_AT_ONCE * SPAN, n = 0; n < SPANS_AT_ONCE && first < last; n++, first += SPAN) {
        fetch_span(c->keys, first + SPAN, last - first - SPAN);
        take_span(c, first, last - first < SPAN ? last - first : SPAN, room, across);
        for (long q = 0; q < c->queries; q++)
            if (c->visible[c->begin + q] > first)
                score_span(c, q, across, c->scores + q * c->across + first);
    }
}

/* Orders as the score does; the two zeros are one. */
INLINE uint32_t order_of(float score)
{
    union { float f; uint32_t u; } bits = {score + 0.0f};
    return bits.u & 0x80000000u ? ~bits.u : bits.u | 0x80000000u;
}

/* The `nth` largest of some numbers, counted from 1; they are moved about. */
static uint32_t nth_largest(uint32_t *order, long count, long nth)
{
    long low = 0, high = count - 1, at = nth - 1;
    while (low < high) {
        uint32_t pivot = order[low + (high - low) / 2];
        long i = low, j = high;
        while (i <= j) {
            while (order[i] > pivot)
                i++;
            while (order[j] < pivot)
                j--;
            if (i <= j) {
                uint32_t kept = order[i];
                order[i++] = order[j], order[j--] = kept;
            }
        }
        if (at <= j)
            high = j;
        else if (at >= i)
            low = i;
        else
            break;
    }
    return order[at];
}

/* The order of the k-th best of some, which are moved about, and how many better ones there are. */
INLINE uint32_t threshold_of(uint32_t *orders, long count, long k, long *better)
{
    uint32_t seen[BUCKETS] = {0};
    long above = 0, some = 0;
    for (long n = 0; n < count; n++)
        seen[orders[n] >> 21]++;
    uint32_t bucket = BUCKETS - 1;
    for (; above + seen[bucket] < k; bucket--)
        above += seen[bucket];
    for (long n = 0; n < count; n++) {
        uint32_t order = orders[n];
        orders[some] = order;
        some += order >> 21 == bucket;
    }
    uint32_t least = nth_largest(orders, some, k - above);
    *better = above;
    for (long n = 0; n < some; n++)
        *better += orders[n] > least;
    return least;
}

/* What the k best of many will be above, most likely: in every sixteenth there are twice as many above, and a few. */
INLINE uint32_t likely_threshold(const float *scores, long count, long k, uint32_t *room)
{
    long some = 0, few = k / 8 + 16;
    if (count < 4 * 16 * few)
        return 0;
    for (long n = 0; n < count; n += 16)
        room[some++] = order_of(scores[n]);
    return nth_largest(room, some, few);
}

/* Which scores' orders are `least` or more, ascending, and those orders. Up to LANES more of each are written. */
INLINE long not_below(const float *scores, long count, uint32_t least, uint32_t *orders, uint32_t *numbers)
{
    long some = 0, n = 0;
#ifdef LEVEL_AVX512
    __m512i number = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15), sign = _mm512_set1_epi32((int)0x80000000);
    for (; n + LANES <= count; n += LANES) {
        __m512i bits = _mm512_castps_si512(v16_add(v16_load(scores + n), v16_all(0.0f)));
        __m512i order = _mm512_xor_si512(bits, _mm512_or_si512(_mm512_srai_epi32(bits, 31), sign));
        __mmask16 kept = _mm512_cmpge_epu32_mask(order, _mm512_set1_epi32((int)least));
        _mm512_storeu_si512(orders + some, _mm512_maskz_compress_epi32(kept, order));
        _mm512_storeu_si512(numbers + some, _mm512_maskz_compress_epi32(kept, number));
        some += __builtin_popcount(kept);
        number = _mm512_add_epi32(number, _mm512_set1_epi32(LANES));
    }
#endif
    for (; n < count; n++) {
        orders[some] = order_of(scores[n]);
        numbers[some] = (uint32_t)n;
        some += orders[some] >= least;
    }
    return some;
}

static void choice_part(void *context, long n)
{
    struct choice *c = context;
    long visible = c->visible[c->begin + n], taken = 0, better;
    int64_t *index = c->index + (c->begin + n) * c->columns;
    if (visible <= c->k) {
        for (; taken < visible; taken++)
            index[taken] = taken;
    } else {
        uint32_t *orders = room_of(ORDER_ROOM, (size_t)(2 * (visible + LANES)) * sizeof *orders), *numbers = orders + visible + LANES;
        if (!orders) {
            atomic_store(&c->failed, 1);
            return;
        }
        const float *scores = c->scores + n * c->across;
        long some = not_below(scores, visible, likely_threshold(scores, visible, c->k, orders), orders, numbers);
        if (some < c->k)
            some = not_below(scores, visible, 0, orders, numbers);
        uint32_t least = threshold_of(orders, some, c->k, &better);
        long equal = c->k - better;
        not_below(scores, visible, least, orders, numbers);
        for (long i = 0; taken < c->k; i++) {
            index[taken] = numbers[i];
            taken += orders[i] > least || equal > 0;
            equal -= orders[i] == least;
        }
    }
    for (; taken < c->columns; taken++)
        index[taken] = 0;
}

static int choose(struct choice c, int threads)
{
    long most = 0;
    for (long t = 0; t < c.tokens; t++)
        most = c.visible[t] > most ? c.visible[t] : most;
    c.across = (most + SPAN - 1) / SPAN * SPAN;
    long at_once = c.across * 64 <= MOST_SCORES ? 64 : MOST_SCORES / c.across + 1;
    at_once = at_once < c.tokens ? at_once : c.tokens;
    c.scores = room_of(SCORES_ROOM, (size_t)(at_once * c.across + 1) * sizeof *c.scores);
    c.folded = room_of(INPUTS_ROOM, (size_t)(at_once * c.heads * (c.width + 1)) * sizeof *c.folded);
    if (!c.scores || !c.folded)
        return -1;
    c.signs = c.folded + at_once * c.heads * c.width;
    for (c.begin = 0; c.begin < c.tokens; c.begin += at_once) {
        c.queries = c.tokens - c.begin < at_once ? c.tokens - c.begin : at_once;
        long last = c.visible[c.begin + c.queries - 1];
        for (long n = 0; n < c.queries; n++)
            fold(&c, n);
        if (last > c.k)
            in_parallel(scores_part, &c, (last + SPANS_AT_ONCE * SPAN - 1) / (SPANS_AT_ONCE * SPAN), threads);
        in_parallel(choice_part, &c, c.queries, threads);
    }
    return atomic_load(&c.failed) ? -1 : 0;
}
