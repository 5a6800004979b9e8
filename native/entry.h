/* The compressor: windows of tokens pooled into entries, and rows as the cache keeps them (spec/model.md 2.7, 3.3, 3.4). */
#ifndef HADAL_ENTRY_H
#define HADAL_ENTRY_H

#include "matrix.h"
#include "parallel.h"
#include "rows.h"

struct pooling {
    const float *kv, *gate;               /* [C * rate, columns]; with overlap the second half of the columns is a window's own */
    const float *before_kv, *before_gate; /* [rate, width] of the window before the first, `before_columns` apart; NULL without overlap */
    long columns, before_columns;
    long rate, width, count; /* C windows */
    float *out;              /* [C, width] */
};

/* One of the rows that an entry is made of, from a column on. The window before comes first. */
INLINE void slot_of(const struct pooling *p, long window, long slot, long begin, const float **kv, const float **gate)
{
    long own = p->before_kv ? slot - p->rate : slot, row = window * p->rate + own;
    if (own < 0 && window == 0) {
        *kv = p->before_kv + slot * p->before_columns + begin, *gate = p->before_gate + slot * p->before_columns + begin;
    } else {
        long at = row * p->columns + (p->before_kv && own >= 0 ? p->width : 0) + begin;
        *kv = p->kv + at, *gate = p->gate + at;
    }
}

/* Some columns of a window's entry: a softmax for each, in the order of the rows. */
INLINE void pool_columns(const struct pooling *p, long window, long begin, long some)
{
    float most[TILE], whole[TILE] = {0}, sums[TILE] = {0};
    for (long i = 0; i < some; i++)
        most[i] = -INFINITY;
    long slots = p->before_kv ? 2 * p->rate : p->rate;
    const float *kv, *gate;
    for (long slot = 0; slot < slots; slot++) {
        slot_of(p, window, slot, begin, &kv, &gate);
        for (long i = 0; i < some; i++)
            most[i] = gate[i] > most[i] ? gate[i] : most[i];
    }
    for (long slot = 0; slot < slots; slot++) {
        slot_of(p, window, slot, begin, &kv, &gate);
        for (long i = 0; i < some; i++) {
            float weight = exponential(gate[i] - most[i]);
            whole[i] += weight;
            sums[i] += weight * kv[i];
        }
    }
    for (long i = 0; i < some; i++)
        p->out[window * p->width + begin + i] = sums[i] / whole[i];
}

static void pooling_part(void *context, long window)
{
    const struct pooling *p = context;
    for (long begin = 0; begin < p->width; begin += TILE)
        pool_columns(p, window, begin, p->width - begin < TILE ? p->width - begin : TILE);
}

static void pool(struct pooling p, int threads)
{
    in_parallel(pooling_part, &p, p.count, p.count > 4 ? threads : 1);
}

/* Index queries or keys, as the indexer sees them: turned by a Hadamard matrix times `factor` unless that is 0, rounded to FP4 if asked to. */
static int index_rows(void *rows, int halves, long count, long width, float factor, int rounds)
{
    float *x = room_of(ROWS_ROOM, (size_t)width * sizeof *x);
    for (long n = 0; x && n < count; n++) {
        void *row = (void *)row_of(rows, n, width, halves);
        load_row(row, halves, width, x);
        for (long step = 1; factor != 0.0f && step < width; step *= 2)
            for (long i = 0; i < width; i += 2 * step)
                for (long low = i; low < i + step; low++) {
                    float a = x[low], b = x[low + step];
                    x[low] = a + b, x[low + step] = a - b;
                }
        for (long i = 0; factor != 0.0f && i < width; i++)
            x[i] *= factor;
        round_halves(x, width, halves);
        if (rounds)
            round_to_e2m1(x, width);
        store_row(x, width, row, halves);
    }
    return x ? 0 : -1;
}

#endif
