/* Rows of the cache where they lie: in pages, in the format that they are kept in (engine/storage_format.py). */
#ifndef HADAL_STORE_H
#define HADAL_STORE_H

#include "matrix.h"
#include "rows.h"

enum packing { AS_FLOATS, AS_HALVES, AS_KV, AS_INDEX };

struct store {
    const void *pages;
    const int64_t *table; /* which page holds the rows n * per_page, n * per_page + 1, ... */
    long per_page, row_bytes;
    enum packing packing;
    long width, rotated; /* elements of a row */
};

INLINE const char *stored_row(const struct store *s, long row)
{
    return (const char *)s->pages + (s->table[row / s->per_page] * s->per_page + row % s->per_page) * s->row_bytes;
}

/* Rows one after another, from `row` on; a page is looked up once. */
struct walk {
    const struct store *store;
    long row, left; /* of the page */
    const char *at;
};

INLINE const char *next_row(struct walk *w)
{
    const struct store *s = w->store;
    if (w->left == 0) {
        w->at = stored_row(s, w->row);
        w->left = s->per_page - w->row % s->per_page;
    } else {
        w->at += s->row_bytes;
    }
    w->row++, w->left--;
    return w->at;
}

/* A row as floats: where it lies, or unpacked into `room`. */
INLINE const float *row_at(const struct store *s, const char *at, float *room)
{
    if (s->packing == AS_FLOATS)
        return (const float *)at;
    if (s->packing == AS_HALVES) {
        load_row(at, 1, s->width, room);
    } else if (s->packing == AS_INDEX) {
        for (long n = 0; n < s->width / BLOCK; n++)
            unpack_block((const uint8_t *)at + n * BLOCK / 2, power_of_two(((const uint8_t *)at)[s->width / 2 + n]), room + n * BLOCK);
    } else {
        long plain = s->width - s->rotated;
        const uint8_t *scales = (const uint8_t *)at + plain + 2 * s->rotated;
        for (long n = 0; n * KV_BLOCK < plain; n++)
            unpack_tile((const uint8_t *)at + n * KV_BLOCK, power_of_two(scales[n]), plain - n * KV_BLOCK < KV_BLOCK ? plain - n * KV_BLOCK : KV_BLOCK,
                        room + n * KV_BLOCK);
        load_row(at + plain, 1, s->rotated, room + plain);
    }
    return room;
}

INLINE const float *row_in(const struct store *s, long row, float *room) { return row_at(s, stored_row(s, row), room); }

/* Keep a row, which has the roundings of its format already (src/hadal/model/quant/entries.py). */
INLINE void put_row(const struct store *s, long row, const float *x)
{
    uint8_t *at = (uint8_t *)stored_row(s, row);
    long plain = s->width - s->rotated;
    if (s->packing == AS_FLOATS || s->packing == AS_HALVES) {
        store_row(x, s->width, at, s->packing == AS_HALVES);
        return;
    }
    memset(at, 0, (size_t)s->row_bytes);
    if (s->packing == AS_INDEX) {
        for (long n = 0; n < s->width / BLOCK; n++) {
            float scale = e2m1_scale(x + n * BLOCK), inverse = 1.0f / scale;
            at[s->width / 2 + n] = power_byte(scale);
            for (long i = n * BLOCK; i < (n + 1) * BLOCK; i++)
                at[i / 2] |= (uint8_t)(e2m1_code(e2m1_value(x[i] * inverse)) << (i & 1 ? 4 : 0));
        }
        return;
    }
    for (long begin = 0; begin < plain; begin += KV_BLOCK) {
        long end = begin + KV_BLOCK < plain ? begin + KV_BLOCK : plain;
        float scale = e4m3_scale(x + begin, end - begin), inverse = 1.0f / scale;
        at[plain + 2 * s->rotated + begin / KV_BLOCK] = power_byte(scale);
        for (long i = begin; i < end; i++)
            at[i] = e4m3_code(e4m3_value(x[i] * inverse));
    }
    store_row(x + plain, s->rotated, at + plain, 1);
}

#endif
