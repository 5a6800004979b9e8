/* A layer for sequences that have one new token each, in two calls: between them what is full becomes an entry.
 *
 * Tables are of 64-bit numbers; src/hadal/model/kernels/blocks.py writes them. */
enum layer_number {
    ATTN_FN, ATTN_BASE, ATTN_SCALE, ATTN_NORM, FFN_FN, FFN_BASE, FFN_SCALE, FFN_NORM, SINK, /* addresses */
    STREAMS, WIDTH, HEADS, HEAD_DIM, LATENT, GROUPS, MIDDLE, KIND, COMPRESSED, INDEX_HEADS, INDEX_DIM, INDEX_COMPRESSED, EXPERTS, ACTIVE, TOP_K,
    WINDOW, ROTATED, SINKHORN, ROUNDS, KEPT, IN_HALVES,
    EPS, HC_EPS, INDEX_SCALE, FACTOR, LIMIT /* bits of a float */
};
enum place { KEY_PLACE, KV_PLACE, GATE_PLACE, INDEX_KV_PLACE, INDEX_GATE_PLACE, PLACES }; /* where a token's rows go; 0 for nowhere */
enum seen { NEAR, BEFORE, VISIBLE, FAR, FAR_TABLE, FAR_ROWS, FAR_BYTES, FAR_PACKING, KEYS, KEYS_TABLE, KEYS_ROWS, KEYS_BYTES, KEYS_PACKING, SEEN };

INLINE float float_in(const int64_t *table, int which)
{
    union { uint32_t u; float f; } bits = {(uint32_t)table[which]};
    return bits.f;
}

INLINE const void *address_in(const int64_t *table, int which) { return (const void *)table[which]; }

/* Room for rows of floats, which hold halves too. */
INLINE void *next_rows(char **room, long rows, long columns)
{
    void *found = *room;
    *room += ((size_t)(rows * columns) * sizeof(float) + 63) / 64 * 64;
    return found;
}

INLINE int read_site(const int64_t *layer, int site, const void *streams, int halves, long count, float *mix, void *x, int level, int threads)
{
    return hadal_mhc_read(streams, halves, count, layer[STREAMS], layer[WIDTH], address_in(layer, site), address_in(layer, site + 1),
                          address_in(layer, site + 2), (int)layer[SINKHORN], float_in(layer, HC_EPS), float_in(layer, EPS), address_in(layer, site + 3),
                          mix, x, level, threads);
}

static struct tokens tokens_of(const int64_t *layer, const void *x, int halves, long count, const int64_t *positions, const float *cos,
                               const float *sin, int threads)
{
    return (struct tokens){x, halves, (int)layer[ROUNDS], count, positions, cos, sin, layer[ROTATED], float_in(layer, EPS), threads};
}

/* Up to what an entry is made of: `mix` [T, N], `q` [T, H, K] and the indexer's query and weights are for the second call. */
int hadal_block_begin(const void *streams, int halves, long count, const int64_t *positions, const float *cos, const float *sin,
                      const int64_t *layer, const int64_t *matrices, float *mix, void *q, void *index_q, void *index_weight, const int64_t *places,
                      int level, int threads)
{
    long width[PLACES] = {layer[HEAD_DIM], layer[COMPRESSED], layer[COMPRESSED], layer[INDEX_COMPRESSED], layer[INDEX_COMPRESSED]};
    long columns = layer[WIDTH] + layer[LATENT] + width[0] + 2 * width[1] + 2 * width[3];
    char *room = room_of(STEP_ROOM, (size_t)(count * columns) * sizeof(float) + (PLACES + 2) * 64);
    if (!room)
        return -1;
    void *x = next_rows(&room, count, layer[WIDTH]), *latent = next_rows(&room, count, layer[LATENT]), *rows[PLACES];
    for (int n = 0; n < PLACES; n++)
        rows[n] = next_rows(&room, count, width[n]);
    if (read_site(layer, ATTN_FN, streams, halves, count, mix, x, level, threads))
        return -1;
    struct tokens t = tokens_of(layer, x, halves, count, positions, cos, sin, threads);
    if (at(level)->project(t, matrices, layer[HEADS], layer[INDEX_HEADS], float_in(layer, INDEX_SCALE), (int)layer[KEPT], (int)layer[KIND], latent, q,
                           rows[KEY_PLACE], rows[KV_PLACE], rows[GATE_PLACE], index_q, index_weight, rows[INDEX_KV_PLACE], rows[INDEX_GATE_PLACE]))
        return -1;
    for (long n = 0; n < count; n++)
        for (int part = 0; part < PLACES; part++)
            if (places[n * PLACES + part]) {
                size_t bytes = (size_t)width[part] * (halves && part == KEY_PLACE ? 2 : 4);
                memcpy((void *)places[n * PLACES + part], (char *)rows[part] + (size_t)n * bytes, bytes);
            }
    return 0;
}

static struct store store_in(const int64_t *seen, int from, long width, long rotated)
{
    return (struct store){address_in(seen, from), address_in(seen, from + 1), seen[from + 2], seen[from + 3], (enum packing)seen[from + 4], width,
                          rotated};
}

/* One sequence's token: what it attends to of its entries, and what comes of it. */
static int attend_alone(const int64_t *layer, const int64_t *seen, int halves, const void *q, const void *index_q, const void *index_weight,
                        int64_t *chosen, void *out, int level, int threads)
{
    struct store far = store_in(seen, FAR, layer[HEAD_DIM], layer[ROTATED]), keys = store_in(seen, KEYS, layer[INDEX_DIM], 0);
    if (keys.pages) {
        struct choice c = {.q = index_q, .weight = index_weight, .halves = halves, .tokens = 1, .heads = layer[INDEX_HEADS],
                           .width = layer[INDEX_DIM], .keys = &keys, .visible = seen + VISIBLE, .k = layer[TOP_K], .columns = layer[TOP_K],
                           .in_halves = (int)layer[IN_HALVES], .index = chosen};
        if (at(level)->choose(c, threads))
            return -1;
    }
    struct attention a = {.q = q, .out = out, .halves = halves, .tokens = 1, .heads = layer[HEADS], .width = layer[HEAD_DIM],
                          .near = address_in(seen, NEAR), .before = seen[BEFORE], .window = layer[WINDOW], .far = far.pages ? &far : NULL,
                          .visible = seen + VISIBLE, .chosen = keys.pages ? chosen : NULL, .most = keys.pages ? layer[TOP_K] : 0,
                          .sink = address_in(layer, SINK)};
    return at(level)->attend(a, threads);
}

/* From there to the streams behind the layer. */
int hadal_block_end(const void *streams, int halves, long count, const int64_t *ids, const float *cos, const float *sin, const int64_t *layer,
                    const int64_t *after, const int64_t *feed, const float *mix, const void *q, const void *index_q, const void *index_weight,
                    const int64_t *seen, void *out, int level, int threads)
{
    long size = halves ? 2 : 4, m = layer[STREAMS], all = layer[HEADS] * layer[HEAD_DIM], index = layer[INDEX_HEADS] * layer[INDEX_DIM];
    long columns = all + layer[MIDDLE] + 2 * layer[WIDTH] + m * layer[WIDTH] + (2 + m) * m + 2 * layer[TOP_K];
    char *room = room_of(STEP_ROOM, (size_t)(count * columns) * sizeof(float) + 8 * 64);
    if (!room)
        return -1;
    char *o = next_rows(&room, count, all);
    void *middle = next_rows(&room, count, layer[MIDDLE]), *x = next_rows(&room, count, layer[WIDTH]), *y = next_rows(&room, count, layer[WIDTH]);
    void *between = next_rows(&room, count, m * layer[WIDTH]), *chosen = next_rows(&room, 1, 2 * layer[TOP_K]);
    float *ffn_mix = next_rows(&room, count, (2 + m) * m);
    for (long n = 0; n < count; n++)
        if (attend_alone(layer, seen + n * SEEN, halves, (const char *)q + n * all * size, (const char *)index_q + n * index * size,
                         (const char *)index_weight + n * layer[INDEX_HEADS] * size, chosen, o + n * all * size, level, threads))
            return -1;
    struct tokens heads = tokens_of(layer, o, halves, count, NULL, cos, sin, threads), normed = tokens_of(layer, x, halves, count, NULL, cos, sin, threads);
    return at(level)->attention_output(heads, after, layer[HEADS], layer[GROUPS], middle, y) ||
                   hadal_mhc_write(streams, y, halves, count, m, layer[WIDTH], mix, between, level, threads) ||
                   read_site(layer, FFN_FN, between, halves, count, ffn_mix, x, level, threads) ||
                   at(level)->feed_forward(normed, feed, ids, layer[EXPERTS], layer[ACTIVE], float_in(layer, FACTOR), float_in(layer, LIMIT), y) ||
                   hadal_mhc_write(between, y, halves, count, m, layer[WIDTH], ffn_mix, out, level, threads)
               ? -1
               : 0;
}
