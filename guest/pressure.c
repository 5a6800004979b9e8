/* A machine whose memory does not suffice. Linux ends a process where nothing is left to be given back, but a page of a running
 * program always is: near the limit it may read them from the disk again and again, for minutes, and nothing else gets done. Its
 * own measure of that (PSI) says how long all processes have waited for memory at once; where that is most of the time,
 * the process that Linux would choose is ended here, as it does. */
#define _GNU_SOURCE
#include <ctype.h>
#include <dirent.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <unistd.h>

#include "guest.h"

#define PRESSURE "/proc/pressure/memory"
#define TRIGGER "full 2000000 4000000" /* two of four seconds, in microseconds */

void watch_pressure(void)
{
    guest.pressure = (struct source){.kind = S_PRESSURE, .fd = open(PRESSURE, O_RDWR | O_NONBLOCK | O_CLOEXEC)};
    if (guest.pressure.fd < 0)
        return; /* a kernel without: it does what it does */
    if (write(guest.pressure.fd, TRIGGER, sizeof TRIGGER) < 0) {
        close(guest.pressure.fd);
        guest.pressure.fd = -1;
        return;
    }
    watch(&guest.pressure, EPOLLPRI);
}

/* What Linux would end first; 0 if there is nothing. */
static pid_t worst_process(void)
{
    pid_t worst = 0;
    long most = 0;
    DIR *all = opendir("/proc");
    for (struct dirent *entry; all && (entry = readdir(all));) {
        char path[300], line[32];
        if (!isdigit((unsigned char)entry->d_name[0]) || atoi(entry->d_name) == getpid())
            continue;
        snprintf(path, sizeof path, "/proc/%s/oom_score", entry->d_name);
        long score = read_line(path, line, sizeof line) ? atol(line) : 0;
        if (score > most)
            most = score, worst = atoi(entry->d_name);
    }
    if (all)
        closedir(all);
    return worst;
}

void relieve_pressure(void)
{
    pid_t worst = worst_process();
    if (worst > 0 && kill(worst, SIGKILL) == 0)
        guest.pressure_kills++;
}
