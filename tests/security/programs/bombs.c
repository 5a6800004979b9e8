/* Uses up one kind of thing until it is refused or killed, then holds it for some seconds. It prints how far
 * it came, if it may. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/timerfd.h>
#include <netinet/in.h>
#include <time.h>
#include <unistd.h>

static char block[1 << 20];

static void fill(int fd)
{
    fcntl(fd, F_SETFL, O_NONBLOCK);
    while (write(fd, block, sizeof block) > 0)
        ;
}

static long anonymous(void)
{
    for (long n = 0;; n++) {
        char *memory = mmap(NULL, sizeof block, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (memory == MAP_FAILED)
            return n;
        memset(memory, 1, sizeof block);
    }
}

static long file_of(const char *path)
{
    int fd = open(path, O_WRONLY | O_CREAT | O_TRUNC, 0600);
    long n = 0;
    while (write(fd, block, sizeof block) == (ssize_t)sizeof block)
        n++;
    return n;
}

static long in_memory(void)
{
    int fd = memfd_create("bomb", 0);
    long n = 0;
    while (write(fd, block, sizeof block) == (ssize_t)sizeof block)
        n++;
    return n;
}

static long pipes(void)
{
    long n = 0;
    for (int ends[2]; pipe(ends) == 0; n++) {
        fcntl(ends[1], F_SETPIPE_SZ, sizeof block);
        fill(ends[1]);
    }
    return n;
}

static long unix_sockets(void)
{
    long n = 0;
    for (int ends[2]; socketpair(AF_UNIX, SOCK_STREAM, 0, ends) == 0; n++) {
        int size = 16 << 20;
        setsockopt(ends[0], SOL_SOCKET, SO_SNDBUF, &size, sizeof size);
        fill(ends[0]);
    }
    return n;
}

static long tcp_sockets(void)
{
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t length = sizeof address;
    int listening = socket(AF_INET, SOCK_STREAM, 0), size = 16 << 20;
    if (bind(listening, (struct sockaddr *)&address, length) || listen(listening, 4096))
        return -1;
    getsockname(listening, (struct sockaddr *)&address, &length);
    for (long n = 0; n < 400; n++) {
        int fd = socket(AF_INET, SOCK_STREAM, 0);
        setsockopt(fd, SOL_SOCKET, SO_SNDBUF, &size, sizeof size);
        if (fd < 0 || connect(fd, (struct sockaddr *)&address, length))
            return n;
        fill(fd);
    }
    return 400;
}

static void *idle(void *none)
{
    pause();
    return none;
}

static long threads(void)
{
    pthread_attr_t small;
    pthread_attr_init(&small);
    pthread_attr_setstacksize(&small, 64 << 10);
    pthread_t thread;
    long n = 0;
    while (pthread_create(&thread, &small, idle, NULL) == 0)
        n++;
    return n;
}

static long zombies(void)
{
    long n = 0;
    for (pid_t pid; (pid = fork()) >= 0; n++)
        if (pid == 0)
            _exit(0);
    return n;
}

static long descriptors(void)
{
    long n = 0;
    while (open("/dev/null", O_RDONLY) >= 0)
        n++;
    return n;
}

static long polls(void)
{
    long n = 0;
    for (int fd; (fd = epoll_create1(0)) >= 0; n++) {
        int timer = timerfd_create(CLOCK_MONOTONIC, 0);
        struct itimerspec often = {{0, 100000}, {0, 100000}};
        struct epoll_event event = {.events = EPOLLIN};
        timerfd_settime(timer, 0, &often, NULL);
        epoll_ctl(fd, EPOLL_CTL_ADD, timer, &event);
    }
    return n;
}

static long small_files(void)
{
    char name[64];
    for (long n = 0;; n++) {
        if (n % 1000 == 0 && (snprintf(name, sizeof name, "/tmp/d%ld", n / 1000), mkdir(name, 0755)))
            return n;
        snprintf(name, sizeof name, "/tmp/d%ld/%ld", n / 1000, n);
        int fd = open(name, O_WRONLY | O_CREAT, 0600);
        if (fd < 0)
            return n;
        close(fd);
    }
}

static long deep(void)
{
    long n = 0;
    if (mkdir("/tmp/deep", 0755) || chdir("/tmp/deep"))
        return -1;
    while (n < 100000 && mkdir("d", 0755) == 0 && chdir("d") == 0)
        n++;
    return n;
}

int main(int count, char **arguments)
{
    static const struct { const char *name; long (*run)(void); } kinds[] = {
        {"anonymous", anonymous}, {"memfd", in_memory}, {"pipes", pipes}, {"unix", unix_sockets},
        {"tcp", tcp_sockets}, {"threads", threads}, {"zombies", zombies}, {"descriptors", descriptors},
        {"polls", polls}, {"inodes", small_files}, {"deep", deep},
    };
    signal(SIGPIPE, SIG_IGN);
    long result = -1;
    const char *kind = count > 1 ? arguments[1] : "";
    for (size_t i = 0; i < sizeof kinds / sizeof *kinds; i++)
        if (!strcmp(kinds[i].name, kind))
            result = kinds[i].run();
    if (*kind == '/')
        result = file_of(kind);
    printf("count=%ld\nerror=%s\n", result, strerrorname_np(errno));
    fflush(stdout);
    sleep(count > 2 ? (unsigned)atoi(arguments[2]) : 0);
    return 0;
}
