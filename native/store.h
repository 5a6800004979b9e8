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

/* A row as floats: where it lies, or unpacked into `room`. */
INLINE const float *row_in(const struct store *s, long row, float *room)
{
    const char *at = stored_row(s, row);
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

#endif
