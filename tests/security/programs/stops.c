/* Processes that stop and continue everything that they can, each other and the init's children too. */
#define _GNU_SOURCE
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* KIND COUNT: "all" at once, or "each" by its number, as fast as it goes. */
int main(int count, char **arguments)
{
    int processes = count > 2 ? atoi(arguments[2]) : 1;
    int each = count > 1 && !strcmp(arguments[1], "each");
    for (int i = 1; i < processes; i++)
        if (fork() == 0)
            break;
    setsid(); /* so that no end of a session takes it along */
    for (pid_t pid = 2;; pid = pid < 2000 ? pid + 1 : 2) {
        if (each && pid == getpid())
            continue;
        kill(each ? pid : -1, SIGSTOP);
        kill(each ? pid : -1, SIGCONT);
    }
}
