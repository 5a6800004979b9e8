/* Runs of small steps that belong to one layer, in one call: what a token needs no other token for. */
#include "experts.h"
#include "product.h"
#include "route.h"
#include "rows.h"

/* Tables of addresses and sizes, as src/hadal/model/kernels/plans.py writes them. */
INLINE const void *next_address(const int64_t **table) { return (const void *)*(*table)++; }

INLINE struct matrix next_matrix(const int64_t **table)
{
    struct matrix m = {next_address(table), next_address(table), (enum format)(*table)[0], (*table)[1], (*table)[2]};
    *table += 3;
    return m;
}

struct tokens {
    const void *x; /* [T, D] */
    int halves, rounds;
    long count;
    const int64_t *positions; /* [T] */
    const float *cos, *sin;   /* [T, R / 2] */
    long rotated;
    float eps;
    int threads;
};

INLINE int times(const struct tokens *t, const void *x, struct matrix m, int rounds, void *y, int y_halves)
{
    return product(x, t->halves, t->count, m, 1, rounds && t->rounds, y, y_halves, t->threads);
}

/* Keys and pooling logits of a compressor, float32. */
static int compress(const struct tokens *t, const int64_t **table, float *kv, float *gate)
{
    struct matrix wkv = next_matrix(table), wgate = next_matrix(table);
    const float *bias = next_address(table);
    long rate = *(*table)++;
    if (times(t, t->x, wkv, 0, kv, 0) || times(t, t->x, wgate, 0, gate, 0))
        return -1;
    for (long n = 0; n < t->count; n++)
        for (long i = 0; i < wgate.outer; i++)
            gate[n * wgate.outer + i] += bias[t->positions[n] % rate * wgate.outer + i];
    return 0;
}

/* Queries, window keys, and what compressor and indexer make of a token. `kinds`: 0 window, 1 HCA, 2 CSA. */
static int project(struct tokens t, const int64_t *table, long heads, long index_heads, float index_scale, int kept, int kind, void *latent, void *q,
                   void *key, float *kv, float *gate, void *index_q, void *index_weight, float *index_kv, float *index_gate)
{
    struct matrix wq_a = next_matrix(&table), wq_b, wkv;
    const void *q_norm = next_address(&table);
    wq_b = next_matrix(&table), wkv = next_matrix(&table);
    const void *kv_norm = next_address(&table);
    if (times(&t, t.x, wq_a, 1, latent, t.halves) || times(&t, t.x, wkv, 1, key, t.halves))
        return -1;
    struct vectors normed = {.x = latent, .out = latent, .halves = t.halves, .tokens = t.count, .heads = 1, .width = wq_a.outer, .normed = 1,
                             .eps = t.eps, .weight = q_norm};
    struct vectors keys = {.x = key, .out = key, .halves = t.halves, .tokens = t.count, .heads = 1, .width = wkv.outer, .normed = 1, .eps = t.eps,
                           .weight = kv_norm, .cos = t.cos, .sin = t.sin, .rotated = t.rotated, .rounds = kept};
    struct vectors queries = {.x = q, .out = q, .halves = t.halves, .tokens = t.count, .heads = heads, .width = wq_b.outer / heads, .normed = 1,
                              .eps = t.eps, .cos = t.cos, .sin = t.sin, .rotated = t.rotated};
    if (vectors(keys, t.threads) || vectors(normed, t.threads) || times(&t, latent, wq_b, 1, q, t.halves) || vectors(queries, t.threads))
        return -1;
    if (kind && compress(&t, &table, kv, gate))
        return -1;
    if (kind < 2)
        return 0;
    struct matrix index_wq_b = next_matrix(&table), weights = next_matrix(&table);
    struct vectors turned = {.x = index_q, .out = index_q, .halves = t.halves, .tokens = t.count, .heads = index_heads,
                             .width = index_wq_b.outer / index_heads, .cos = t.cos, .sin = t.sin, .rotated = t.rotated};
    if (times(&t, latent, index_wq_b, 1, index_q, t.halves) || vectors(turned, t.threads) || times(&t, t.x, weights, 0, index_weight, t.halves) ||
        compress(&t, &table, index_kv, index_gate))
        return -1;
    for (long i = 0; i < t.count * index_heads; i++)
        if (t.halves)
            ((uint16_t *)index_weight)[i] = narrowed(widened(((uint16_t *)index_weight)[i]) * index_scale);
        else
            ((float *)index_weight)[i] *= index_scale;
    return 0;
}

/* What attention found, rotated back and projected: each group by its own block of wo_a, then all by wo_b. */
static int attention_output(struct tokens t, const int64_t *table, long heads, long groups, void *middle, void *out)
{
    struct matrix wo_a = next_matrix(&table), wo_b = next_matrix(&table);
    struct vectors back = {.x = t.x, .out = (void *)t.x, .halves = t.halves, .tokens = t.count, .heads = heads, .width = groups * wo_a.inner / heads,
                           .cos = t.cos, .sin = t.sin, .rotated = t.rotated, .inverse = 1};
    return vectors(back, t.threads) || product(t.x, t.halves, t.count, wo_a, groups, 0, middle, t.halves, t.threads) ||
           times(&t, middle, wo_b, 1, out, t.halves);
}

/* Gate and experts. `table` has the gate, its bias and hash table (or zeros), then three matrices for each expert. */
static int feed_forward(struct tokens t, const int64_t *table, const int64_t *ids, long count, long active, float factor, float limit, void *out)
{
    struct expert expert[count];
    int64_t number[count], *routes = room_of(ROUTES_ROOM, (size_t)(t.count * active) * (sizeof *routes + sizeof(float)));
    if (!routes)
        return -1;
    float *weights = (float *)(routes + t.count * active);
    struct routing r = {.x = t.x, .halves = t.halves, .tokens = t.count, .gate = next_matrix(&table), .ids = ids, .active = active, .factor = factor,
                        .routes = routes, .weights = weights};
    r.bias = next_address(&table), r.table = next_address(&table);
    for (long n = 0; n < count; n++) {
        number[n] = n == count - 1 ? -1 : n;
        expert[n].w1 = next_matrix(&table), expert[n].w3 = next_matrix(&table), expert[n].w2 = next_matrix(&table);
    }
    return route(r, t.threads) || experts(t.x, t.halves, t.count, expert, count, number, routes, weights, active, limit, t.rounds, out, t.threads);
}
