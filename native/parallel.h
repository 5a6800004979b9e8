/* Work shared among threads: those of torch's OpenMP library, so that there is one pool and nobody waits beside another. */
#ifndef HADAL_PARALLEL_H
#define HADAL_PARALLEL_H

#include <stddef.h>

/* Do `work(context, n)` for every n below `count`, in any order. */
void in_parallel(void (*work)(void *context, long n), void *context, long count, int threads);

/* Memory of this thread that stays, for what lasts no longer than a call. NULL where there is none. */
enum room { INPUTS_ROOM, WEIGHTS_ROOM, HIDDEN_ROOM, SUMS_ROOM, KEYS_ROOM, SCORES_ROOM, ROWS_ROOM, ORDER_ROOM, ROUTES_ROOM, STEP_ROOM, STEP_ROWS_ROOM, ROOMS };
void *room_of(enum room which, size_t bytes);

#endif
