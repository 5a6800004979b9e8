#define _GNU_SOURCE
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <time.h>
#include <unistd.h>

#include "guest.h"

#define CHUNK (32 * 1024)

static uint64_t held(const struct stream *s) { return s->end - s->start; }

static bool beyond_limit(const struct stream *s) { return s->limit && s->end >= s->limit; }

/* Room for more in the ring: it doubles up to WINDOW. */
static void grow(struct stream *s)
{
    if (held(s) < s->capacity || s->capacity == WINDOW)
        return;
    uint64_t capacity = s->capacity ? s->capacity * 4 : 4096;
    if (capacity > WINDOW)
        capacity = WINDOW;
    uint8_t *ring = allocate(capacity);
    for (uint64_t at = s->start; at < s->end; at++)
        ring[at % capacity] = s->ring[at % s->capacity];
    free(s->ring);
    s->ring = ring;
    s->capacity = capacity;
}

static ssize_t read_head(struct stream *s)
{
    grow(s);
    if (held(s) == s->capacity) {
        if (s->source.command->attached || guest.patience_ends) {
            errno = ENOSPC; /* the daemon, or the next one, will take it; until then the command waits */
            return -1;
        }
        s->start += CHUNK; /* nobody listens: the command must go on, the oldest bytes go */
        if (s->sent < s->start)
            s->sent = s->start;
    }
    uint64_t position = s->end % s->capacity, room = s->capacity - held(s);
    if (room > s->capacity - position)
        room = s->capacity - position;
    if (s->limit && room > s->limit - s->end)
        room = s->limit - s->end;
    ssize_t n = read(s->source.fd, s->ring + position, room);
    if (n > 0)
        s->end += (uint64_t)n;
    return n;
}

static ssize_t read_tail(struct stream *s)
{
    uint8_t chunk[CHUNK];
    ssize_t n = read(s->source.fd, chunk, sizeof chunk);
    if (n <= 0)
        return n;
    if (!s->tail)
        s->tail = allocate(TAIL);
    for (ssize_t i = n > TAIL ? n - TAIL : 0; i < n; i++)
        s->tail[(s->tail_total + (uint64_t)i) % TAIL] = chunk[i];
    s->tail_total += (uint64_t)n;
    return n;
}

/* Whoever the command left behind may go on writing; nobody reads that. */
static void discard(struct stream *s)
{
    char chunk[CHUNK];
    ssize_t n = read(s->source.fd, chunk, sizeof chunk);
    if (n == 0 || (n < 0 && errno != EAGAIN && errno != EINTR))
        unwatch(&s->source);
}

/* One read; whether there may be more. */
static bool read_once(struct stream *s)
{
    struct command *c = s->source.command;
    ssize_t n = beyond_limit(s) ? read_tail(s) : read_head(s);
    if (n > 0) {
        s->total += (uint64_t)n;
        if (c->quiet)
            c->quiet_due = clock_ns(CLOCK_MONOTONIC) + c->quiet;
        s->drain -= (uint64_t)n < s->drain ? (uint64_t)n : s->drain;
        s->settled = c->ended && !s->drain;
        return !s->settled;
    }
    if (n < 0 && errno == ENOSPC) {
        watch(&s->source, 0);
        return false;
    }
    if (n == 0 || (errno != EAGAIN && errno != EINTR))
        unwatch(&s->source); /* closed; a terminal says EIO */
    s->settled = c->ended;
    return false;
}

void read_stream(struct stream *s)
{
    if (s->settled) {
        discard(s);
        return;
    }
    for (int turn = 0; turn < 4 && read_once(s); turn++)
        ;
}

/* The command has ended: what is in the pipe is still its output, and at most a pipe full is. */
void settle_stream(struct stream *s)
{
    if (s->source.fd < 0)
        s->settled = true;
    while (!s->settled && read_once(s))
        ;
}

static void acknowledge_stream(struct stream *s, uint64_t offset)
{
    if (offset > s->end)
        offset = s->end;
    if (offset <= s->start)
        return;
    s->start = offset;
    if (s->sent < s->start)
        s->sent = s->start;
    watch(&s->source, EPOLLIN);
    if (s->source.command->ended && !s->settled)
        settle_stream(s);
}

void acknowledge(struct command *c, uint64_t out, uint64_t err)
{
    acknowledge_stream(&c->out[0], out);
    acknowledge_stream(&c->out[1], err);
}

void attach_command(struct command *c, uint64_t out, uint64_t err)
{
    c->attached = true;
    c->exit_sent = c->tail_sent = false;
    acknowledge(c, out, err);
    for (int i = 0; i < 2; i++)
        c->out[i].sent = c->out[i].start;
}

void wake_unattached(void)
{
    for (struct command *c = guest.commands; c; c = c->next)
        for (int i = 0; i < 2 && !c->attached; i++)
            watch(&c->out[i].source, EPOLLIN);
}

void detach_all(void)
{
    for (struct command *c = guest.commands; c; c = c->next)
        c->attached = false;
    wake_unattached();
}

static void put_output(int type, uint64_t id, uint64_t offset, const uint8_t *ring, uint64_t capacity,
                       uint64_t from, uint64_t length)
{
    struct bytes *out = &guest.connection.out;
    size_t start = begin_frame(out, (uint16_t)type, id);
    uint64_t position = from % capacity;
    uint64_t first = length < capacity - position ? length : capacity - position;
    bytes_add(out, &offset, 8);
    bytes_add(out, ring + position, first);
    bytes_add(out, ring, length - first);
    end_frame(out, start);
}

static bool send_stream(struct command *c, int index)
{
    struct stream *s = &c->out[index];
    uint64_t length = s->end - s->sent;
    if (!length)
        return false;
    if (length > CHUNK)
        length = CHUNK;
    put_output(index ? F_STDERR : F_STDOUT, c->id, s->sent, s->ring, s->capacity, s->sent, length);
    s->sent += length;
    return true;
}

static void send_tails(struct command *c)
{
    for (int i = 0; i < 2; i++) {
        struct stream *s = &c->out[i];
        uint64_t length = s->tail_total < TAIL ? s->tail_total : TAIL;
        if (length)
            put_output(i ? F_STDERR : F_STDOUT, c->id, s->total - length, s->tail, TAIL,
                       s->tail_total - length, length);
    }
}

static void send_exit(struct command *c)
{
    struct bytes *out = &guest.connection.out;
    size_t start = begin_frame(out, F_EXIT, c->id);
    put_number(out, T_STATUS, (uint64_t)c->status);
    put_number(out, T_OUT_TOTAL, c->out[0].total);
    put_number(out, T_ERR_TOTAL, c->out[1].total);
    put_number(out, T_TIMED_OUT, (uint64_t)c->timed_out);
    put_number(out, T_START_TIME, c->start_time);
    put_number(out, T_TIME, c->end_time);
    put_number(out, T_USER_US, c->user_us);
    put_number(out, T_SYSTEM_US, c->system_us);
    put_number(out, T_MAX_RSS_KB, c->max_rss_kb);
    put_number(out, T_OOM_KILLS, c->oom_kills);
    end_frame(out, start);
}

bool send_pending(struct command *c)
{
    if (!c->attached || c->forgotten)
        return false;
    bool sent = send_stream(c, 0);
    sent |= send_stream(c, 1);
    if (sent || !c->ended || c->exit_sent || !c->out[0].settled || !c->out[1].settled)
        return sent;
    if (!c->tail_sent)
        send_tails(c);
    c->tail_sent = true;
    send_exit(c);
    c->exit_sent = true;
    return true;
}
