/* The feed-forward part: experts with SwiGLU, each over the tokens that are sent to it (spec/model.md 2.9).
 *
 * A token's sum visits its experts in the order of their numbers, and the shared one last. */
#ifndef HADAL_EXPERTS_H
#define HADAL_EXPERTS_H

#include "product.h"
#include "rows.h"

#define HIDDEN_AT_ONCE 64 /* columns of a part; outputs, too, where there are many tokens */

struct expert {
    struct matrix w1, w3, w2;
    long first, rows; /* of `token` */
};

struct experts {
    const void *x; /* [T, width], rounded if asked to: floats, or exact where the products are */
    void *out;     /* [T, D] */
    int halves, rounds, exactly;
    long tokens, outer, hidden, width, hidden_width; /* T, D, F; padded D, padded F */
    float limit;
    struct expert *expert;
    long count;         /* the shared one is the last */
    const long *token;  /* rows of each expert, one after another */
    const float *scale; /* of each of those; 1 for the shared one's */
    float *inner;       /* [rows, hidden_width]; made exact where it lies */
    float *total;       /* [T, D] */
    long outputs_at_once;
    atomic_int failed;
};

/* The gate is clamped from above only, the linear part on both sides (spec T12). */
INLINE float swiglu(float gate, float up, float limit)
{
    gate = gate > limit ? limit : gate;
    up = up > limit ? limit : up < -limit ? -limit : up;
    return gate * sigmoid(gate) * up;
}

/* out = scale swiglu(gate, up), row by row; for an expert whose matrices are divided among processes. */
static void swiglu_rows(const void *gate, const void *up, int halves, long rows, long width, float limit, const float *scale, void *out)
{
    for (long t = 0; t < rows; t++)
        for (long begin = 0; begin < width; begin += TILE) {
            float gates[TILE], ups[TILE];
            long some = width - begin < TILE ? width - begin : TILE, at = t * width + begin;
            load_row(row_of(gate, at, 1, halves), halves, some, gates);
            load_row(row_of(up, at, 1, halves), halves, some, ups);
            for (long i = 0; i < some; i++)
                gates[i] = swiglu(gates[i], ups[i], limit) * (scale ? scale[t] : 1.0f);
            store_row(gates, some, (void *)row_of(out, at, 1, halves), halves);
        }
}

/* gates = scale swiglu(gates, ups), rounded as the modules do; row by row, also for columns that stand for no output, so that
 * these are loops of vectors. */
INLINE void activate(const struct experts *e, float *gates, float *ups, long rows, const float *scale)
{
    long count = rows * MOST_OUTPUTS;
    round_halves(gates, count, e->halves);
    round_halves(ups, count, e->halves);
    for (long i = 0; i < count; i++)
        gates[i] = swiglu(gates[i], ups[i], e->limit);
    for (long t = 0; t < rows; t++)
        for (long i = 0; i < MOST_OUTPUTS; i++)
            gates[t * MOST_OUTPUTS + i] *= scale[t];
    round_halves(gates, count, e->halves);
}

/* Some hidden columns of one expert, for the rows `x` of it. `gate` and `up` are outputs of w1 and w3, or NULL to read them as they
 * are stored. */
INLINE void hidden_block(struct experts *e, const struct expert *expert, const void *const *x, long row, long rows, long o, long some,
                         const void *const *gate, const void *const *up)
{
    long first = expert->first + row, row_bytes = e->width * size_of(e->exactly);
    float gates[ROWS_AT_ONCE * MOST_OUTPUTS], ups[ROWS_AT_ONCE * MOST_OUTPUTS];
    if (some < MOST_OUTPUTS) {
        memset(gates, 0, (size_t)(rows * MOST_OUTPUTS) * sizeof *gates);
        memset(ups, 0, (size_t)(rows * MOST_OUTPUTS) * sizeof *ups);
    }
    if (gate) {
        dots(x, gate, row_bytes, e->exactly, rows, some, gates, MOST_OUTPUTS);
        dots(x, up, row_bytes, e->exactly, rows, some, ups, MOST_OUTPUTS);
    } else {
        thin_dots(&expert->w1, e->exactly, x, rows, o, some, gates, MOST_OUTPUTS);
        thin_dots(&expert->w3, e->exactly, x, rows, o, some, ups, MOST_OUTPUTS);
    }
    activate(e, gates, ups, rows, e->scale + first);
    for (long t = 0; t < rows; t++) {
        float *inner = e->inner + (first + t) * e->hidden_width + o;
        if (some == MOST_OUTPUTS)
            v16_store(inner, v16_load(gates + t * MOST_OUTPUTS));
        else
            memcpy(inner, gates + t * MOST_OUTPUTS, (size_t)some * sizeof *gates);
    }
}

/* Some rows stay in the second cache while the columns of a part pass. */
static void hidden_part(void *context, long n)
{
    struct experts *e = context;
    long parts = (e->hidden + HIDDEN_AT_ONCE - 1) / HIDDEN_AT_ONCE, begin = n % parts * HIDDEN_AT_ONCE;
    const struct expert *expert = e->expert + n / parts;
    long count = e->hidden - begin < HIDDEN_AT_ONCE ? e->hidden - begin : HIDDEN_AT_ONCE, row_bytes = e->width * size_of(e->exactly);
    int thin = is_thin(&expert->w1, expert->rows, e->exactly);
    const void *gate[HIDDEN_AT_ONCE], *up[HIDDEN_AT_ONCE], *x[ROWS_AT_ONCE];
    if (!thin) {
        char *room = room_of(WEIGHTS_ROOM, (size_t)(2 * HIDDEN_AT_ONCE * row_bytes));
        if (!room) {
            atomic_store(&e->failed, 1);
            return;
        }
        unpack_outputs(&expert->w1, e->exactly, begin, count, e->width, room, gate);
        unpack_outputs(&expert->w3, e->exactly, begin, count, e->width, room + HIDDEN_AT_ONCE * row_bytes, up);
    }
    for (long row = 0; row < expert->rows; row += ROWS_AT_ONCE) {
        long rows = expert->rows - row < ROWS_AT_ONCE ? expert->rows - row : ROWS_AT_ONCE;
        for (long t = 0; t < rows; t++)
            x[t] = (const char *)e->x + e->token[expert->first + row + t] * row_bytes;
        for (long o = 0; o < count; o += MOST_OUTPUTS)
            hidden_block(e, expert, x, row, rows, begin + o, count - o < MOST_OUTPUTS ? count - o : MOST_OUTPUTS, thin ? NULL : gate + o, up + o);
    }
}

/* A row of what w2 multiplies, as it is multiplied. */
static void rounding_part(void *context, long n)
{
    struct experts *e = context;
    float *row = e->inner + n * e->hidden_width;
    if (e->rounds)
        round_row(row, e->hidden, TILE);
    for (long i = 0; e->exactly && i < e->hidden_width; i += COLUMNS)
        pairs_store((exact *)row + i, pairs_of_floats(row + i)); /* never beyond what has been read */
}

/* total += sums of some outputs, rounded as the modules do. */
INLINE void add_outputs(const struct experts *e, const long *token, long rows, float *sums, long begin, long some)
{
    round_halves(sums, rows * MOST_OUTPUTS, e->halves);
    for (long t = 0; t < rows; t++) {
        const float *own = sums + t * MOST_OUTPUTS;
        float *total = e->total + token[t] * e->outer + begin;
        if (some == MOST_OUTPUTS)
            v16_store(total, v16_add(v16_load(total), v16_load(own)));
        else
            for (long i = 0; i < some; i++)
                total[i] += own[i];
    }
}

/* Some rows of one expert by some outputs, `w`, or NULL to read them as they are stored. */
INLINE void output_block(struct experts *e, const struct expert *expert, long row, long begin, long some, const void *const *w)
{
    const void *inner[ROWS_AT_ONCE];
    long rows = expert->rows - row < ROWS_AT_ONCE ? expert->rows - row : ROWS_AT_ONCE, first = expert->first + row;
    float sums[ROWS_AT_ONCE * MOST_OUTPUTS];
    if (some < MOST_OUTPUTS)
        memset(sums, 0, (size_t)(rows * MOST_OUTPUTS) * sizeof *sums);
    for (long t = 0; t < rows; t++)
        inner[t] = e->inner + (first + t) * e->hidden_width;
    if (w)
        dots(inner, w, e->hidden_width * size_of(e->exactly), e->exactly, rows, some, sums, MOST_OUTPUTS);
    else
        thin_dots(&expert->w2, e->exactly, inner, rows, begin, some, sums, MOST_OUTPUTS);
    add_outputs(e, e->token + first, rows, sums, begin, some);
}

/* Some outputs of all experts in order, for all tokens. */
static void output_part(void *context, long n)
{
    struct experts *e = context;
    long begin = n * e->outputs_at_once, count = e->outer - begin < e->outputs_at_once ? e->outer - begin : e->outputs_at_once;
    char *room = room_of(WEIGHTS_ROOM, (size_t)(e->outputs_at_once * e->hidden_width * size_of(e->exactly)));
    if (!room) {
        atomic_store(&e->failed, 1);
        return;
    }
    for (const struct expert *expert = e->expert; expert < e->expert + e->count; expert++) {
        const void *w[HIDDEN_AT_ONCE];
        int thin = is_thin(&expert->w2, expert->rows, e->exactly);
        if (!thin)
            unpack_outputs(&expert->w2, e->exactly, begin, count, e->hidden_width, room, w);
        for (long row = 0; row < expert->rows; row += ROWS_AT_ONCE)
            for (long o = 0; o < count; o += MOST_OUTPUTS)
                output_block(e, expert, row, begin + o, count - o < MOST_OUTPUTS ? count - o : MOST_OUTPUTS, thin ? NULL : w + o);
    }
    for (long t = 0; t < e->tokens; t++)
        store_row(e->total + t * e->outer + begin, count, (char *)e->out + (t * e->outer + begin) * (e->halves ? 2 : 4), e->halves);
}

/* Runs experts whose rows and memory are set. */
static int run_experts(struct experts *e, int threads)
{
    long parts = (e->hidden + HIDDEN_AT_ONCE - 1) / HIDDEN_AT_ONCE, rows = 0;
    for (long n = 0; n < e->count; n++)
        rows += e->expert[n].rows;
    in_parallel(hidden_part, e, e->count * parts, threads);
    if (e->rounds || e->exactly)
        in_parallel(rounding_part, e, rows, threads);
    e->outputs_at_once = e->tokens < HIDDEN_AT_ONCE ? MOST_OUTPUTS : HIDDEN_AT_ONCE;
    in_parallel(output_part, e, (e->outer + e->outputs_at_once - 1) / e->outputs_at_once, threads);
    return atomic_load(&e->failed) ? -1 : 0;
}

/* Share the tokens out among the experts. `expert` has `count` of them, whose matrices are set, the shared one last. */
static int experts(const void *x, int halves, long tokens, struct expert *expert, long count, const int64_t *ids, const int64_t *routes,
                   const float *weights, long active, float limit, int rounds, void *out, int threads)
{
    struct experts e = {.out = out, .halves = halves, .rounds = rounds, .tokens = tokens, .outer = expert->w2.outer, .hidden = expert->w1.outer,
                        .limit = limit, .expert = expert, .count = count};
    e.width = padded(expert->w1.inner), e.hidden_width = padded(e.hidden);
    e.exactly = 1;
    for (long n = 0; n < count; n++)
        e.exactly &= is_exact(&expert[n].w1, halves) && is_exact(&expert[n].w3, halves) && is_exact(&expert[n].w2, halves);
    long rows = tokens * (active + 1);
    void *inputs = room_of(INPUTS_ROOM, (size_t)(tokens * e.width * size_of(e.exactly)));
    float *scale = room_of(SCORES_ROOM, (size_t)rows * sizeof *scale);
    long *token = room_of(ORDER_ROOM, (size_t)rows * sizeof *token), found = 0;
    e.inner = room_of(HIDDEN_ROOM, (size_t)(rows * e.hidden_width) * sizeof *e.inner);
    e.total = room_of(SUMS_ROOM, (size_t)(tokens * e.outer) * sizeof *e.total);
    if (!inputs || !scale || !token || !e.inner || !e.total ||
        take_inputs(x, halves, tokens, expert->w1.inner, rounds, e.exactly, inputs, e.width, threads))
        return -1;
    memset(e.total, 0, (size_t)(tokens * e.outer) * sizeof *e.total);
    long used = 0;
    for (long n = 0; n < count; n++) {
        expert[n].first = found;
        for (long t = 0; t < tokens; t++)
            for (long a = 0; a < active; a++)
                if (n == count - 1 ? a == 0 : routes[t * active + a] == ids[n]) {
                    token[found] = t;
                    scale[found++] = n == count - 1 ? 1.0f : weights[t * active + a];
                }
        expert[n].rows = found - expert[n].first;
        if (expert[n].rows)
            expert[used++] = expert[n];
    }
    e.count = used;
    if (e.hidden_width != e.hidden)
        memset(e.inner, 0, (size_t)(rows * e.hidden_width) * sizeof *e.inner);
    e.x = inputs, e.token = token, e.scale = scale;
    return run_experts(&e, threads);
}

#endif
