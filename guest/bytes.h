/* Growable bytes, and the fields of protocol.h in them. Memory that cannot be had ends the process. */
#ifndef HADAL_BYTES_H
#define HADAL_BYTES_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct bytes {
    uint8_t *data;
    size_t length, capacity;
};

void *allocate(size_t size);
void bytes_reserve(struct bytes *b, size_t more);
void bytes_add(struct bytes *b, const void *data, size_t length);
extern size_t bytes_kept; /* the most that stays allocated when all is dropped */
void bytes_drop(struct bytes *b, size_t length); /* from the front */
void bytes_free(struct bytes *b);

void put_field(struct bytes *b, uint16_t tag, const void *value, size_t length);
void put_text(struct bytes *b, uint16_t tag, const char *text);
void put_number(struct bytes *b, uint16_t tag, uint64_t number);
/* A header with room for a payload; the length is set by end_frame. */
size_t begin_frame(struct bytes *b, uint16_t type, uint64_t id);
void end_frame(struct bytes *b, size_t start);

uint64_t read_number(const uint8_t *data, size_t length);

struct field {
    uint16_t tag;
    uint32_t length;
    const uint8_t *value;
};
/* The next field of a payload. False at the end; *broken is set where the bytes do not add up. */
bool next_field(const uint8_t **at, const uint8_t *end, struct field *field, bool *broken);
char *field_text(const struct field *field); /* a new string; NULL if it holds a zero byte */

#endif
