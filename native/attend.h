/* One softmax over a query's window, the entries it sees, and the sink (spec/model.md 2.5). Keys are values.
 *
 * Keys are taken in the order of their positions, the window first, so the sums of a query do not depend on the batch. */
#include "store.h"
#include "tile.h"
#include <stdatomic.h>

#define KEYS_AT_ONCE 64
#define MOST_UNPACKED (16l << 20) /* floats of entries */
#define MOST_HEADS 64 /* at once; more are taken in turns */

struct attention {
    const void *q; /* [T, H, K] */
    void *out;     /* the same */
    int halves;
    long tokens, heads, width;
    const void *near; /* [before + T, K], the window's keys, as q */
    long before, window;
    const struct store *far; /* or NULL */
    const int64_t *visible;  /* [T] of its rows, the first */
    const int64_t *chosen;   /* [T, most]: of those, the rows that are seen; or NULL for all */
    long most;
    const float *sink; /* [H] */
    const float *near_floats, *far_floats; /* all rows as floats, where that pays; or NULL */
    long heads_at_once, head_parts;
    atomic_int failed;
};

INLINE long keys_seen(const struct attention *a, long t, long *first)
{
    long last = a->before + t, low = last - a->window + 1;
    *first = low < 0 ? 0 : low;
    long far = !a->far ? 0 : a->chosen && a->visible[t] > a->most ? a->most : a->visible[t];
    return last - *first + 1 + far;
}

/* Key n of a query, as floats. */
INLINE const float *key_of(const struct attention *a, long t, long first, long near, long n, float *room)
{
    if (n < near)
        return a->near_floats + (first + n) * a->width;
    long row = a->chosen ? a->chosen[t * a->most + n - near] : n - near;
    return a->far_floats ? a->far_floats + row * a->width : row_in(a->far, row, room);
}

/* Of some numbers and `least`. */
INLINE float largest(const float *x, long count, float least)
{
    float lanes[LANES];
    long n = 0;
    for (int i = 0; i < LANES; i++)
        lanes[i] = least;
    for (; n + LANES <= count; n += LANES)
        for (int i = 0; i < LANES; i++)
            lanes[i] = x[n + i] > lanes[i] ? x[n + i] : lanes[i];
    for (; n < count; n++)
        lanes[0] = x[n] > lanes[0] ? x[n] : lanes[0];
    for (int i = 0; i < LANES; i++)
        least = lanes[i] > least ? lanes[i] : least;
    return least;
}

/* Logits to what probabilities are in proportion to. Returns their sum and the sink's, which the weighed keys are divided by: they
 * are fewer. */
INLINE float softmax_with_sink(float *logits, long count, float sink)
{
    float most = largest(logits, count, sink), lanes[LANES] = {0};
    for (long n = 0; n < count; n++)
        logits[n] = exponential(logits[n] - most);
    long n = 0;
    for (; n + LANES <= count; n += LANES)
        for (int i = 0; i < LANES; i++)
            lanes[i] += logits[n + i];
    for (int i = 0; n + i < count; i++)
        lanes[i] += logits[n + i];
    return v16_sum(v16_load(lanes)) + exponential(sink - most);
}

/* sums[h] += p[h][n] keys[n] for some heads and LANES * parts of their columns. */
INLINE void weigh(const float *const *keys, long count, const float *p, long stride, int heads, int parts, float *sums, long across)
{
    v16 sum[ROWS][OUTPUTS];
    for (int h = 0; h < heads; h++)
        for (int i = 0; i < parts; i++)
            sum[h][i] = v16_load(sums + h * across + i * LANES);
    for (long n = 0; n < count; n++)
        for (int i = 0; i < parts; i++) {
            v16 key = v16_load(keys[n] + i * LANES);
            for (int h = 0; h < heads; h++)
                sum[h][i] = v16_fma(v16_all(p[h * stride + n]), key, sum[h][i]);
        }
    for (int h = 0; h < heads; h++)
        for (int i = 0; i < parts; i++)
            v16_store(sums + h * across + i * LANES, sum[h][i]);
}

INLINE void weigh_all(const float *const *keys, long count, const float *p, long stride, long heads, long width, float *sums)
{
    const float *part[KEYS_AT_ONCE];
    for (long begin = 0; begin < width; begin += LANES * OUTPUTS) {
        int parts = width - begin < LANES * OUTPUTS ? (int)((width - begin) / LANES) : OUTPUTS;
        for (long n = 0; n < count; n++)
            part[n] = keys[n] + begin;
        for (long h = 0; h < heads; h += ROWS) {
            int few = heads - h < ROWS ? (int)(heads - h) : ROWS;
            float *at = sums + h * width + begin;
            if (few == ROWS && parts == OUTPUTS)
                weigh(part, count, p + h * stride, stride, ROWS, OUTPUTS, at, width);
            else
                for (int one = 0; one < few; one++)
                    for (int i = 0; i < parts; i++) {
                        const float *narrow[KEYS_AT_ONCE];
                        for (long n = 0; n < count; n++)
                            narrow[n] = part[n] + i * LANES;
                        weigh(narrow, count, p + (h + one) * stride, stride, 1, 1, at + one * width + i * LANES, width);
                    }
        }
    }
}

/* Some heads of one query. */
INLINE void attend_query(const struct attention *a, long t, long low, long heads, float *room)
{
    long first, count = keys_seen(a, t, &first), near = a->before + t - first + 1, width = a->width;
    float *q = room, *sums = q + heads * width, *logits = sums + heads * width, *unpacked = logits + heads * count;
    const float *keys[KEYS_AT_ONCE], *query[MOST_HEADS];
    int copies = a->far && !a->far_floats && a->far->packing != AS_FLOATS;
    load_row(row_of(a->q, t * a->heads + low, width, a->halves), a->halves, heads * width, q);
    memset(sums, 0, (size_t)(heads * width) * sizeof *sums);
    for (long h = 0; h < heads; h++)
        query[h] = q + h * width;
    float scale = 1.0f / sqrtf((float)width), whole[MOST_HEADS];
    for (long begin = 0; begin < count; begin += KEYS_AT_ONCE) {
        long some = count - begin < KEYS_AT_ONCE ? count - begin : KEYS_AT_ONCE;
        for (long n = 0; n < some; n++)
            keys[n] = key_of(a, t, first, near, begin + n, unpacked + (copies ? (begin + n) * width : 0));
        dots((const void *const *)query, (const void *const *)keys, width * (long)sizeof(float), 0, heads, some, logits + begin, count);
    }
    for (long n = 0; n < heads * count; n++)
        logits[n] *= scale;
    for (long h = 0; h < heads; h++)
        whole[h] = softmax_with_sink(logits + h * count, count, a->sink[low + h]);
    for (long begin = 0; begin < count; begin += KEYS_AT_ONCE) {
        long some = count - begin < KEYS_AT_ONCE ? count - begin : KEYS_AT_ONCE;
        for (long n = 0; n < some; n++) {
            long at = begin + n;
            keys[n] = copies && at >= near ? unpacked + at * width : key_of(a, t, first, near, at, unpacked);
        }
        weigh_all(keys, some, logits + begin, count, heads, width, sums);
    }
    for (long h = 0; h < heads; h++)
        for (long i = 0; i < width; i++)
            sums[h * width + i] /= whole[h];
    store_row(sums, heads * width, (void *)row_of(a->out, t * a->heads + low, width, a->halves), a->halves);
}

static void attention_part(void *context, long n)
{
    struct attention *a = context;
    long first, t = n / a->head_parts, low = n % a->head_parts * a->heads_at_once, count = keys_seen(a, t, &first);
    long heads = a->heads - low < a->heads_at_once ? a->heads - low : a->heads_at_once;
    int copies = a->far && !a->far_floats && a->far->packing != AS_FLOATS;
    float *room = room_of(ROWS_ROOM, (size_t)(2 * heads * a->width + heads * count + (copies ? count * a->width : 0)) * sizeof *room);
    if (room)
        attend_query(a, t, low, heads, room);
    else
        atomic_store(&a->failed, 1);
}

struct unpacking {
    const struct store *store;
    float *out;
    long count;
};

static void unpacking_part(void *context, long n)
{
    const struct unpacking *u = context;
    long end = (n + 1) * VECTORS_AT_ONCE < u->count ? (n + 1) * VECTORS_AT_ONCE : u->count;
    for (long row = n * VECTORS_AT_ONCE; row < end; row++) {
        float *to = u->out + row * u->store->width;
        const float *from = row_in(u->store, row, to);
        if (from != to)
            memcpy(to, from, (size_t)u->store->width * sizeof *to);
    }
}

/* The window as floats, and the entries too, if they are looked at more than once. */
static int prepare_keys(struct attention *a, int threads)
{
    long near = a->before + a->tokens, looks = 0, rows = 0;
    a->near_floats = a->near;
    if (a->halves) {
        float *floats = room_of(KEYS_ROOM, (size_t)(near * a->width) * sizeof *floats);
        if (!floats)
            return -1;
        load_row(a->near, 1, near * a->width, floats);
        a->near_floats = floats;
    }
    for (long t = 0; a->far && t < a->tokens; t++) {
        rows = a->visible[t] > rows ? a->visible[t] : rows;
        looks += a->chosen && a->visible[t] > a->most ? a->most : a->visible[t];
    }
    if (a->far && a->far->packing != AS_FLOATS && looks >= 2 * rows && rows * a->width <= MOST_UNPACKED) {
        struct unpacking u = {a->far, room_of(WEIGHTS_ROOM, (size_t)(rows * a->width) * sizeof(float)), rows};
        if (rows && !u.out)
            return -1;
        in_parallel(unpacking_part, &u, (rows + VECTORS_AT_ONCE - 1) / VECTORS_AT_ONCE, threads);
        a->far_floats = u.out;
    }
    return 0;
}

static int attend(struct attention a, int threads)
{
    if (prepare_keys(&a, threads))
        return -1;
    a.heads_at_once = a.heads < MOST_HEADS ? a.heads : MOST_HEADS;
    if (a.tokens < threads && a.heads_at_once >= 2 * OUTPUTS)
        a.heads_at_once /= 2;
    a.head_parts = (a.heads + a.heads_at_once - 1) / a.heads_at_once;
    in_parallel(attention_part, &a, a.tokens * a.head_parts, threads);
    return atomic_load(&a.failed) ? -1 : 0;
}
