/* Tries every way to the sockets of the init and of the node, whose paths on the host are the arguments:
 * by path, through /proc, by abstract names, by file handles, through the init's descriptors, and by sending
 * frames to whatever socket is found open. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <unistd.h>

static void report(const char *name, long result)
{
    printf("%s=%s\n", name, result >= 0 ? "OK" : strerrorname_np(errno));
}

static void connect_to(const char *path, int abstract)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    snprintf(address.sun_path + abstract, sizeof address.sun_path - 1, "%s", path);
    int fd = socket(AF_UNIX, SOCK_STREAM, 0);
    char name[300];
    snprintf(name, sizeof name, "%s%s", abstract ? "@" : "", path);
    report(name, connect(fd, (struct sockaddr *)&address,
                         (socklen_t)(sizeof(sa_family_t) + (size_t)abstract + strlen(path) + !abstract)));
    close(fd);
}

int main(int count, char **arguments)
{
    char path[300];
    for (int i = 1; i < count; i++) {
        static const char *const prefixes[] = {"", "/proc/1/root", "/proc/self/root", "/proc/1/cwd",
                                               "/proc/self/cwd/../../../../.."};
        for (size_t k = 0; k < sizeof prefixes / sizeof *prefixes; k++) {
            snprintf(path, sizeof path, "%s%s", prefixes[k], arguments[i]);
            connect_to(path, 0);
        }
        connect_to(arguments[i], 1);
    }
    for (int fd = 0; fd < 12; fd++) {
        snprintf(path, sizeof path, "/proc/1/fd/%d", fd);
        connect_to(path, 0);
        report(path, open(path, O_RDWR | O_NONBLOCK));
        struct stat s;
        snprintf(path, sizeof path, "own socket %d", fd);
        errno = ENOTSOCK;
        report(path, fd > 2 && fstat(fd, &s) == 0 && S_ISSOCK(s.st_mode) ? 0 : -1);
    }
    int init = (int)syscall(SYS_pidfd_open, 1, 0);
    for (int fd = 0; fd < 8; fd++) {
        snprintf(path, sizeof path, "pidfd_getfd %d", fd);
        report(path, syscall(SYS_pidfd_getfd, init, fd, 0));
    }
    return 0;
}
