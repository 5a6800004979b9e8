/* Which experts a token goes to, and with what weights (spec/model.md 2.9). */
#ifndef HADAL_ROUTE_H
#define HADAL_ROUTE_H

#include "product.h"

struct routing {
    const void *x;
    int halves;
    long tokens;
    struct matrix gate;
    const float *bias;    /* [E] for the choice only; or NULL in a hash layer, with */
    const int64_t *table; /* [V, A], and */
    const int64_t *ids;   /* [T] */
    long active;          /* A */
    float factor;
    int64_t *routes; /* [T, A] */
    float *weights;  /* the same */
};

INLINE float softplus(float x)
{
    return (x > 0.0f ? x : 0.0f) + log1pf(expf(-fabsf(x)));
}

/* The best by score and bias, the lowest first where they are equal. */
INLINE void best_experts(const float *scores, const float *bias, long experts, long active, int64_t *routes)
{
    for (long a = 0; a < active; a++) {
        long best = -1;
        float most = 0.0f;
        for (long n = 0; n < experts; n++) {
            int taken = 0;
            for (long b = 0; b < a; b++)
                taken |= routes[b] == n;
            float score = scores[n] + bias[n];
            if (!taken && (best < 0 || score > most))
                best = n, most = score;
        }
        routes[a] = best;
    }
}

static int route(struct routing r, int threads)
{
    long experts = r.gate.outer;
    float *scores = room_of(SCORES_ROOM, (size_t)(r.tokens * experts) * sizeof *scores);
    if (!scores || product(r.x, r.halves, r.tokens, r.gate, 1, 0, scores, 0, threads))
        return -1;
    for (long t = 0; t < r.tokens; t++) {
        float *own = scores + t * experts, *weights = r.weights + t * r.active, sum = 0.0f;
        int64_t *routes = r.routes + t * r.active;
        for (long n = 0; n < experts; n++)
            own[n] = sqrtf(softplus(own[n]));
        if (r.table)
            memcpy(routes, r.table + r.ids[t] * r.active, (size_t)r.active * sizeof *routes);
        else
            best_experts(own, r.bias, experts, r.active, routes);
        for (long a = 0; a < r.active; a++)
            sum += weights[a] = own[routes[a]];
        for (long a = 0; a < r.active; a++)
            weights[a] = weights[a] / sum * r.factor;
    }
    return 0;
}

#endif
