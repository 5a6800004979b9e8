/* Everything at one level: a file defines LEVEL_TABLE, and LEVEL_AVX2 or LEVEL_AVX512 or neither, and includes this. */
#include "attend.h"
#include "choose.h"
#include "entry.h"
#include "experts.h"
#include "layer.h"
#include "mhc.h"
#include "product.h"
#include "route.h"
#include "rows.h"

struct level {
    int (*product)(const void *x, int x_halves, long rows, struct matrix m, long groups, int rounds, void *y, int y_halves, int threads);
    int (*vectors)(struct vectors v, int threads);
    int (*mhc_read)(struct mixture s, int threads);
    int (*mhc_write)(struct writing s, int threads);
    int (*attend)(struct attention a, int threads);
    int (*choose)(struct choice c, int threads);
    int (*route)(struct routing r, int threads);
    int (*project)(struct tokens t, const int64_t *table, long heads, long index_heads, float index_scale, int kept, int kind, void *latent, void *q,
                   void *key, float *kv, float *gate, void *index_q, void *index_weight, float *index_kv, float *index_gate);
    int (*attention_output)(struct tokens t, const int64_t *table, long heads, long groups, void *middle, void *out);
    int (*feed_forward)(struct tokens t, const int64_t *table, const int64_t *ids, long count, long active, float factor, float limit, void *out);
    void (*swiglu_rows)(const void *gate, const void *up, int halves, long rows, long width, float limit, const float *scale, void *out);
    void (*pool)(struct pooling p, int threads);
    int (*index_rows)(void *rows, int halves, long count, long width, float factor, int rounds);
    int (*experts)(const void *x, int halves, long tokens, struct expert *expert, long count, const int64_t *ids, const int64_t *routes,
                   const float *weights, long active, float limit, int rounds, void *out, int threads);
};

const struct level LEVEL_TABLE = {product, vectors, mhc_read, mhc_write, attend, choose, route, project, attention_output, feed_forward, swiglu_rows, pool, index_rows, experts};
