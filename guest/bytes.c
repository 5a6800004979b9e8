#include "bytes.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "protocol.h"

void *allocate(size_t size)
{
    void *memory = calloc(1, size ? size : 1);
    if (!memory) {
        static const char text[] = "hadal-guest: out of memory\n";
        (void)!write(2, text, sizeof text - 1);
        _exit(70);
    }
    return memory;
}

void bytes_reserve(struct bytes *b, size_t more)
{
    if (b->capacity - b->length >= more)
        return;
    size_t capacity = b->capacity ? b->capacity : 256;
    while (capacity - b->length < more)
        capacity *= 2;
    uint8_t *data = allocate(capacity);
    if (b->length)
        memcpy(data, b->data, b->length);
    free(b->data);
    b->data = data;
    b->capacity = capacity;
}

void bytes_add(struct bytes *b, const void *data, size_t length)
{
    bytes_reserve(b, length);
    if (length)
        memcpy(b->data + b->length, data, length);
    b->length += length;
}

size_t bytes_kept = 64 * 1024;

void bytes_drop(struct bytes *b, size_t length)
{
    b->length -= length;
    memmove(b->data, b->data + length, b->length);
    if (b->length == 0 && b->capacity > bytes_kept)
        bytes_free(b); /* a burst does not stay resident */
}

void bytes_free(struct bytes *b)
{
    free(b->data);
    *b = (struct bytes){0};
}

void put_field(struct bytes *b, uint16_t tag, const void *value, size_t length)
{
    uint32_t size = (uint32_t)length;
    bytes_add(b, &tag, 2);
    bytes_add(b, &size, 4);
    bytes_add(b, value, length);
}

void put_text(struct bytes *b, uint16_t tag, const char *text)
{
    put_field(b, tag, text, strlen(text));
}

void put_number(struct bytes *b, uint16_t tag, uint64_t number)
{
    put_field(b, tag, &number, 8);
}

size_t begin_frame(struct bytes *b, uint16_t type, uint64_t id)
{
    size_t start = b->length;
    uint32_t length = 0;
    uint16_t zero = 0;
    bytes_add(b, &length, 4);
    bytes_add(b, &type, 2);
    bytes_add(b, &zero, 2);
    bytes_add(b, &id, 8);
    return start;
}

void end_frame(struct bytes *b, size_t start)
{
    uint32_t length = (uint32_t)(b->length - start - HEADER_BYTES);
    memcpy(b->data + start, &length, 4);
}

uint64_t read_number(const uint8_t *data, size_t length)
{
    uint64_t number = 0;
    memcpy(&number, data, length < 8 ? length : 8);
    return number;
}

bool next_field(const uint8_t **at, const uint8_t *end, struct field *field, bool *broken)
{
    if (*at == end)
        return false;
    if (end - *at < 6 || (uint64_t)(end - *at - 6) < read_number(*at + 2, 4)) {
        *broken = true;
        return false;
    }
    field->tag = (uint16_t)read_number(*at, 2);
    field->length = (uint32_t)read_number(*at + 2, 4);
    field->value = *at + 6;
    *at += 6 + field->length;
    return true;
}

char *field_text(const struct field *field)
{
    if (memchr(field->value, 0, field->length))
        return NULL;
    char *text = allocate(field->length + 1);
    memcpy(text, field->value, field->length);
    return text;
}
