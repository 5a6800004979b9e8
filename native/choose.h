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

#if defined LEVEL_AVX2 || defined LEVEL_AVX512
/* Eight columns of eight rows. */
INLINE void turn_eight(const float *const *rows, long i, float *out)
{
    __m256 r[8], s[8], t[8];
    for (int n = 0; n < 8; n++)
        r[n] = _mm256_loadu_ps(rows[n] + i);
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
INLINE void turn(const float *const *key, long width, float *out)
{
    long i = 0;
#if defined LEVEL_AVX2 || defined LEVEL_AVX512
    for (; i + 8 <= width; i += 8)
        for (long o = 0; o < SPAN; o += 8)
            turn_eight(key + o, i, out + o);
#endif
    for (; i < width; i++)
        for (long o = 0; o < SPAN; o++)
            out[i * SPAN + o] = key[o][i];
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
        long there = last - first < SPAN ? last - first : SPAN;
        const float *key[SPAN];
        for (long o = 0; o < SPAN; o++) {
            float *own = room + o * c->width;
            key[o] = o < there ? row_in(c->keys, first + o, own) : memset(own, 0, (size_t)c->width * sizeof *own);
            if (c->in_halves && o < there) {
                if (key[o] != own)
                    key[o] = memcpy(own, key[o], (size_t)c->width * sizeof *own);
                round_halves(own, c->width, 1);
            }
        }
        turn(key, c->width, across);
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

/* The order of the k-th best, and how many better ones there are. */
INLINE uint32_t threshold_of(const float *scores, long count, long k, uint32_t *room, long *better)
{
    uint32_t seen[BUCKETS] = {0};
    long above = 0, some = 0;
    for (long n = 0; n < count; n++)
        seen[order_of(scores[n]) >> 21]++;
    uint32_t bucket = BUCKETS - 1;
    for (; above + seen[bucket] < k; bucket--)
        above += seen[bucket];
    for (long n = 0; n < count; n++) {
        room[some] = order_of(scores[n]);
        some += room[some] >> 21 == bucket;
    }
    uint32_t least = nth_largest(room, some, k - above);
    *better = above;
    for (long n = 0; n < some; n++)
        *better += room[n] > least;
    return least;
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
        uint32_t *room = room_of(ORDER_ROOM, (size_t)(visible + 1) * sizeof *room);
        if (!room) {
            atomic_store(&c->failed, 1);
            return;
        }
        const float *scores = c->scores + n * c->across;
        uint32_t least = threshold_of(scores, visible, c->k, room, &better);
        long equal = c->k - better;
        for (long i = 0; taken < c->k; i++) {
            uint32_t order = order_of(scores[i]);
            int chosen = order > least || (order == least && equal > 0);
            equal -= order == least;
            index[taken] = i;
            taken += chosen;
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
