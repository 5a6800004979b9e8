/* Uses up what a user may have of the kernel: inotify instances, timers, queued signals. With "hold" a child
 * keeps it for half a minute; with "ask" one of each is asked for. */
#define _GNU_SOURCE
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/inotify.h>
#include <time.h>
#include <unistd.h>

int main(int count, char **arguments)
{
    int hold = count > 1 && !strcmp(arguments[1], "hold"), ready[2];
    if (pipe(ready))
        return 1;
    if (fork()) {
        char byte;
        return read(ready[0], &byte, 1) != 1;
    }
    int most = hold ? 200000 : 1, inotify = 0, timers = 0;
    timer_t timer;
    while (inotify < most && inotify_init() >= 0)
        inotify++;
    while (timers < most && timer_create(CLOCK_MONOTONIC, NULL, &timer) == 0)
        timers++;
    printf("inotify=%d\ntimers=%d\n", inotify, timers);
    fflush(stdout);
    if (write(ready[1], "x", 1) != 1)
        return 1;
    if (hold) {
        freopen("/dev/null", "w", stdout);
        sleep(30);
    }
    return 0;
}
