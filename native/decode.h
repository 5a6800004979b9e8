/* A run of layers for sequences that have one new token each, in one call: what a token leaves behind is written where the
 * tapes of its sequence say, and what is full becomes an entry.
 *
 * Tables are of 64-bit numbers, which src/hadal/model/kernels/decode.py writes. */
#include <time.h>

enum layer_number {
    ATTN_FN, ATTN_BASE, ATTN_SCALE, ATTN_NORM, FFN_FN, FFN_BASE, FFN_SCALE, FFN_NORM, SINK, ENTRY_NORM, INDEX_NORM, /* addresses */
    STREAMS, WIDTH, HEADS, HEAD_DIM, LATENT, GROUPS, MIDDLE, KIND, COMPRESSED, INDEX_HEADS, INDEX_DIM, INDEX_COMPRESSED, EXPERTS, ACTIVE, TOP_K,
    WINDOW, RATE, ROTATED, SINKHORN, ROUNDS, KEPT, INDEX_FP4, IN_HALVES,
    EPS, HC_EPS, INDEX_SCALE, FACTOR, LIMIT, TURN /* bits of a float */
};
/* Of one layer of a sequence: its window's keys, `BEFORE` of which were there before the first token of the tape; rings of what
 * the compressors made of its last tokens, a window of them, or two where windows overlap; entries and index keys. */
enum tape_number { KEYS, BEFORE, TAIL_KV, TAIL_GATE, INDEX_KV, INDEX_GATE, ENTRIES, INDEX_KEYS = ENTRIES + 5, TAPE = INDEX_KEYS + 5 };
/* Of a sequence: the numbers of its layers, the positions of the tape's first token and of the new one, and, from the first
 * one's row on, cosines and sines of the tokens after a multiple of SPAN_TOKENS, of layers without and with compression. */
enum sequence_number { TAPES, FIRST, POSITION, COS, SIN, FAR_COS, FAR_SIN, SEQUENCE };
#define SPAN_TOKENS 128
/* What time goes to, as hadal.model.kernels.decode.PARTS. */
enum part { PROJECTING, REMEMBERING, CHOOSING, ATTENDING, JOINING, FEEDING };

struct run {
    const int64_t *const *tables; /* of a layer four: its numbers, and its matrices before the softmax, behind it, and of the experts */
    const int64_t *ids, *sequences;
    int halves, level, threads;
    long count;
    int64_t *positions;
    float *cos[2], *sin[2]; /* [T, R / 2], without and with compression */
    double *spent, since;   /* seconds, of each part; or NULL */
};

static double seconds_now(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

/* What has passed since the last time was for this part. */
static void count_time(struct run *r, enum part part)
{
    if (!r->spent)
        return;
    double now = seconds_now();
    r->spent[part] += now - r->since;
    r->since = now;
}

INLINE float float_in(const int64_t *table, int which)
{
    union { uint32_t u; float f; } bits = {(uint32_t)table[which]};
    return bits.f;
}

INLINE const void *address_in(const int64_t *table, int which) { return (const void *)table[which]; }

INLINE const int64_t *sequence_of(const struct run *r, long n) { return r->sequences + n * SEQUENCE; }

INLINE const int64_t *tape_of(const struct run *r, long n, long layer) { return (const int64_t *)sequence_of(r, n)[TAPES] + layer * TAPE; }

/* Room for rows of floats, which hold halves too. */
INLINE void *next_rows(char **room, long rows, long columns)
{
    void *found = *room;
    *room += ((size_t)(rows * columns) * sizeof(float) + 63) / 64 * 64;
    return found;
}

static struct tokens tokens_of(const struct run *r, const int64_t *layer, const void *x)
{
    int far = layer[KIND] != 0;
    return (struct tokens){x, r->halves, (int)layer[ROUNDS], r->count, r->positions, r->cos[far], r->sin[far], layer[ROTATED],
                           float_in(layer, EPS), r->threads};
}

static int read_site(const struct run *r, const int64_t *layer, int site, const void *streams, float *mix, void *x)
{
    return hadal_mhc_read(streams, r->halves, r->count, layer[STREAMS], layer[WIDTH], address_in(layer, site), address_in(layer, site + 1),
                          address_in(layer, site + 2), (int)layer[SINKHORN], float_in(layer, HC_EPS), float_in(layer, EPS), address_in(layer, site + 3),
                          mix, x, r->level, r->threads);
}

static int write_site(const struct run *r, const int64_t *layer, const void *streams, const void *y, const float *mix, void *out)
{
    return hadal_mhc_write(streams, y, r->halves, r->count, layer[STREAMS], layer[WIDTH], mix, out, r->level, r->threads);
}

static struct store store_in(const int64_t *tape, int from, long width, long rotated)
{
    return (struct store){address_in(tape, from), address_in(tape, from + 1), tape[from + 2], tape[from + 3], (enum packing)tape[from + 4], width,
                          rotated};
}

/* Rows of a layer's compressor, or of its indexer's. */
struct tail {
    float *kv, *gate;
    long columns, ring;
};

static struct tail tail_in(const int64_t *layer, const int64_t *tape, int index)
{
    int overlaps = layer[KIND] == 2;
    return (struct tail){(float *)address_in(tape, index ? INDEX_KV : TAIL_KV), (float *)address_in(tape, index ? INDEX_GATE : TAIL_GATE),
                         layer[index ? INDEX_COMPRESSED : COMPRESSED], overlaps ? 2 * layer[RATE] : layer[RATE]};
}

static void take_up(const struct tail *t, long position, const float *kv, const float *gate)
{
    size_t bytes = (size_t)t->columns * sizeof(float);
    memcpy(t->kv + position % t->ring * t->columns, kv, bytes);
    memcpy(t->gate + position % t->ring * t->columns, gate, bytes);
}

/* The window that ends at `position` becomes an entry, or an index key. */
static int make_entry(const struct run *r, const int64_t *layer, const int64_t *sequence, const int64_t *tape, int index)
{
    struct tail t = tail_in(layer, tape, index);
    long rate = layer[RATE], position = sequence[POSITION], begin = (position + 1 - rate) % t.ring, width = layer[index ? INDEX_DIM : HEAD_DIM];
    long from = (position + 1 - rate) % SPAN_TOKENS * layer[ROTATED] / 2, before = (begin + rate) % t.ring;
    float *pooled = room_of(STEP_ROWS_ROOM, (size_t)(2 * width) * sizeof *pooled), *row = pooled + width;
    if (!pooled)
        return -1;
    struct pooling p = {.kv = t.kv + begin * t.columns, .gate = t.gate + begin * t.columns, .columns = t.columns, .before_columns = t.columns,
                        .rate = rate, .width = width, .count = 1, .out = pooled};
    if (layer[KIND] == 2)
        p.before_kv = t.kv + before * t.columns, p.before_gate = t.gate + before * t.columns;
    at(r->level)->pool(p, 1);
    store_row(pooled, width, row, r->halves);
    struct vectors v = {.x = row, .out = row, .halves = r->halves, .tokens = 1, .heads = 1, .width = width, .normed = 1, .eps = float_in(layer, EPS),
                        .weight = address_in(layer, index ? INDEX_NORM : ENTRY_NORM), .cos = (const float *)address_in(sequence, FAR_COS) + from,
                        .sin = (const float *)address_in(sequence, FAR_SIN) + from, .rotated = layer[ROTATED], .rounds = !index && layer[KEPT]};
    if (at(r->level)->vectors(v, 1) ||
        (index && at(r->level)->index_rows(row, r->halves, 1, width, float_in(layer, TURN), (int)layer[INDEX_FP4])))
        return -1;
    struct store store = store_in(tape, index ? INDEX_KEYS : ENTRIES, width, index ? 0 : layer[ROTATED]);
    load_row(row, r->halves, width, pooled);
    put_row(&store, position / rate, pooled);
    return 0;
}

/* What a layer makes of the new tokens, in room that the next one takes over. */
struct made {
    float *mix;
    void *x, *latent, *q, *key, *index_q, *index_weight;
    float *kv, *gate, *index_kv, *index_gate;
    char *o;
    void *middle, *y, *between;
    int64_t *chosen;
};

static struct made made_in(const struct run *r, const int64_t *layer, char *room)
{
    long n = r->count, m = layer[STREAMS], all = layer[HEADS] * layer[HEAD_DIM];
    struct made d;
    d.mix = next_rows(&room, n, (2 + m) * m), d.x = next_rows(&room, n, layer[WIDTH]), d.latent = next_rows(&room, n, layer[LATENT]);
    d.q = next_rows(&room, n, all), d.key = next_rows(&room, n, layer[HEAD_DIM]), d.kv = next_rows(&room, n, layer[COMPRESSED]);
    d.gate = next_rows(&room, n, layer[COMPRESSED]), d.index_kv = next_rows(&room, n, layer[INDEX_COMPRESSED]);
    d.index_gate = next_rows(&room, n, layer[INDEX_COMPRESSED]), d.index_q = next_rows(&room, n, layer[INDEX_HEADS] * layer[INDEX_DIM]);
    d.index_weight = next_rows(&room, n, layer[INDEX_HEADS]), d.o = next_rows(&room, n, all), d.middle = next_rows(&room, n, layer[MIDDLE]);
    d.y = next_rows(&room, n, layer[WIDTH]), d.between = next_rows(&room, n, m * layer[WIDTH]), d.chosen = next_rows(&room, 1, 2 * layer[TOP_K]);
    return d;
}

static size_t room_for(const int64_t *layer, long n)
{
    long m = layer[STREAMS];
    long columns = (2 + m) * m + (2 + m) * layer[WIDTH] + layer[LATENT] + 2 * layer[HEADS] * layer[HEAD_DIM] + layer[HEAD_DIM] + 2 * layer[COMPRESSED] +
                   2 * layer[INDEX_COMPRESSED] + layer[INDEX_HEADS] * (layer[INDEX_DIM] + 1) + layer[MIDDLE];
    return (size_t)(n * columns + 2 * layer[TOP_K]) * sizeof(float) + 16 * 64;
}

/* What the sequences remember of their new tokens. */
static int remember(const struct run *r, const int64_t *layer, long which, const struct made *d)
{
    long size = r->halves ? 2 : 4, key_bytes = layer[HEAD_DIM] * size;
    for (long n = 0; n < r->count; n++) {
        const int64_t *sequence = sequence_of(r, n), *tape = tape_of(r, n, which);
        long position = sequence[POSITION], row = tape[BEFORE] + position - sequence[FIRST];
        memcpy((char *)tape[KEYS] + row * key_bytes, (const char *)d->key + n * key_bytes, (size_t)key_bytes);
        for (int index = 0; index < layer[KIND]; index++) {
            struct tail t = tail_in(layer, tape, index);
            take_up(&t, position, (index ? d->index_kv : d->kv) + n * t.columns, (index ? d->index_gate : d->gate) + n * t.columns);
            if ((position + 1) % layer[RATE] == 0 && make_entry(r, layer, sequence, tape, index))
                return -1;
        }
    }
    return 0;
}

/* One sequence's token: what it attends to of its entries, and what comes of it. */
static int attend_alone(struct run *r, const int64_t *layer, long which, const struct made *d, long n)
{
    const int64_t *sequence = sequence_of(r, n), *tape = tape_of(r, n, which);
    long size = r->halves ? 2 : 4, all = layer[HEADS] * layer[HEAD_DIM], rows = tape[BEFORE] + sequence[POSITION] - sequence[FIRST] + 1;
    long near = rows < layer[WINDOW] ? rows : layer[WINDOW], top_k = layer[TOP_K];
    int64_t visible = layer[KIND] ? (sequence[POSITION] + 1) / layer[RATE] : 0;
    int chooses = layer[KIND] == 2 && visible > top_k;
    struct store far = store_in(tape, ENTRIES, layer[HEAD_DIM], layer[ROTATED]), keys = store_in(tape, INDEX_KEYS, layer[INDEX_DIM], 0);
    if (chooses) {
        struct choice c = {.q = (const char *)d->index_q + n * layer[INDEX_HEADS] * layer[INDEX_DIM] * size,
                           .weight = (const char *)d->index_weight + n * layer[INDEX_HEADS] * size, .halves = r->halves, .tokens = 1,
                           .heads = layer[INDEX_HEADS], .width = layer[INDEX_DIM], .keys = &keys, .visible = &visible, .k = top_k, .columns = top_k,
                           .in_halves = (int)layer[IN_HALVES], .index = d->chosen};
        if (at(r->level)->choose(c, r->threads))
            return -1;
        count_time(r, CHOOSING);
    }
    struct attention a = {.q = (const char *)d->q + n * all * size, .out = d->o + n * all * size, .halves = r->halves, .tokens = 1,
                          .heads = layer[HEADS], .width = layer[HEAD_DIM], .near = (const char *)tape[KEYS] + (rows - near) * layer[HEAD_DIM] * size,
                          .before = near - 1, .window = layer[WINDOW], .far = visible ? &far : NULL, .visible = &visible,
                          .chosen = chooses ? d->chosen : NULL, .most = chooses ? top_k : 0, .sink = address_in(layer, SINK)};
    int failed = at(r->level)->attend(a, r->threads);
    count_time(r, ATTENDING);
    return failed;
}

static int attention_part_of(struct run *r, long which, const void *streams, const struct made *d)
{
    const int64_t *const *tables = r->tables + 4 * which, *layer = tables[0];
    if (read_site(r, layer, ATTN_FN, streams, d->mix, d->x) ||
        at(r->level)->project(tokens_of(r, layer, d->x), tables[1], layer[HEADS], layer[INDEX_HEADS], float_in(layer, INDEX_SCALE), (int)layer[KEPT],
                              (int)layer[KIND], d->latent, d->q, d->key, d->kv, d->gate, d->index_q, d->index_weight, d->index_kv, d->index_gate))
        return -1;
    count_time(r, PROJECTING);
    if ((layer[KIND] == 2 && at(r->level)->index_rows(d->index_q, r->halves, r->count * layer[INDEX_HEADS], layer[INDEX_DIM], float_in(layer, TURN),
                                                      (int)layer[INDEX_FP4])) ||
        remember(r, layer, which, d))
        return -1;
    count_time(r, REMEMBERING);
    for (long n = 0; n < r->count; n++)
        if (attend_alone(r, layer, which, d, n))
            return -1;
    if (at(r->level)->attention_output(tokens_of(r, layer, d->o), tables[2], layer[HEADS], layer[GROUPS], d->middle, d->y) ||
        write_site(r, layer, streams, d->y, d->mix, d->between))
        return -1;
    count_time(r, JOINING);
    return 0;
}

static int feed_forward_part_of(struct run *r, long which, const struct made *d, void *out)
{
    const int64_t *const *tables = r->tables + 4 * which, *layer = tables[0];
    if (read_site(r, layer, FFN_FN, d->between, d->mix, d->x) ||
        at(r->level)->feed_forward(tokens_of(r, layer, d->x), tables[3], r->ids, layer[EXPERTS], layer[ACTIVE], float_in(layer, FACTOR),
                                   float_in(layer, LIMIT), d->y) ||
        write_site(r, layer, d->between, d->y, d->mix, out))
        return -1;
    count_time(r, FEEDING);
    return 0;
}

/* Positions and rotations of the tokens, one after another. */
static void gather(struct run *r, long pairs, char **room)
{
    r->positions = next_rows(room, r->count, 2);
    for (int far = 0; far < 2; far++) {
        r->cos[far] = next_rows(room, r->count, pairs), r->sin[far] = next_rows(room, r->count, pairs);
        for (long n = 0; n < r->count; n++) {
            const int64_t *sequence = sequence_of(r, n);
            long from = sequence[POSITION] % SPAN_TOKENS * pairs;
            r->positions[n] = sequence[POSITION];
            memcpy(r->cos[far] + n * pairs, (const float *)address_in(sequence, far ? FAR_COS : COS) + from, (size_t)pairs * sizeof(float));
            memcpy(r->sin[far] + n * pairs, (const float *)address_in(sequence, far ? FAR_SIN : SIN) + from, (size_t)pairs * sizeof(float));
        }
    }
}

/* The streams behind all layers, [T, M, D] as those before them. To `spent` is added what parts took; or NULL. */
int hadal_decode(const void *streams, int halves, long count, const int64_t *ids, const int64_t *const *tables, long layers, const int64_t *sequences,
                 void *out, double *spent, int level, int threads)
{
    struct run r = {.tables = tables, .ids = ids, .sequences = sequences, .halves = halves, .level = level, .threads = threads, .count = count,
                    .spent = spent, .since = spent ? seconds_now() : 0.0};
    long pairs = tables[0][ROTATED] / 2, row = tables[0][STREAMS] * tables[0][WIDTH];
    size_t most = 0;
    for (long n = 0; n < layers; n++)
        most = room_for(tables[4 * n], count) > most ? room_for(tables[4 * n], count) : most;
    char *room = room_of(STEP_ROOM, most + (size_t)(count * (4 * pairs + row + 2)) * sizeof(float) + 6 * 64);
    if (!room)
        return -1;
    gather(&r, pairs, &room);
    void *own = next_rows(&room, count, row);
    for (long n = 0; n < layers; n++) {
        struct made d = made_in(&r, tables[4 * n], room);
        if (attention_part_of(&r, n, n ? own : streams, &d) || feed_forward_part_of(&r, n, &d, n == layers - 1 ? out : own))
            return -1;
    }
    return 0;
}
