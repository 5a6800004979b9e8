#include "parallel.h"
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>

/* GOMP_parallel of libgomp, or of the libraries of others that have it too. */
typedef void parallel_region(void (*run)(void *), void *data, unsigned threads, unsigned flags);
static parallel_region *region;

void hadal_share_threads(void *gomp_parallel)
{
    region = (parallel_region *)gomp_parallel;
}

struct share {
    void (*work)(void *, long);
    void *context;
    long count;
    atomic_long next;
};

static void take_part(void *data)
{
    struct share *share = data;
    for (long n; (n = atomic_fetch_add(&share->next, 1)) < share->count;)
        share->work(share->context, n);
}

void in_parallel(void (*work)(void *, long), void *context, long count, int threads)
{
    struct share share = {work, context, count, 0};
    if (threads > 1 && count > 1 && region)
        region(take_part, &share, (unsigned)(threads < count ? threads : count), 0);
    else
        take_part(&share);
}

struct rooms {
    void *memory[ROOMS];
    size_t size[ROOMS];
};
static pthread_key_t key;
static pthread_once_t once = PTHREAD_ONCE_INIT;

static void leave(void *value)
{
    struct rooms *rooms = value;
    for (int n = 0; n < ROOMS; n++)
        free(rooms->memory[n]);
    free(rooms);
}

static void make_key(void)
{
    pthread_key_create(&key, leave);
}

void *room_of(enum room which, size_t bytes)
{
    pthread_once(&once, make_key);
    struct rooms *rooms = pthread_getspecific(key);
    if (!rooms) {
        rooms = calloc(1, sizeof *rooms);
        if (!rooms || pthread_setspecific(key, rooms)) {
            free(rooms);
            return NULL;
        }
    }
    if (rooms->size[which] < bytes) {
        size_t size = (bytes + bytes / 4 + 63) / 64 * 64;
        free(rooms->memory[which]);
        rooms->memory[which] = aligned_alloc(64, size);
        rooms->size[which] = rooms->memory[which] ? size : 0;
    }
    return rooms->memory[which];
}
