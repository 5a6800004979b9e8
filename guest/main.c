/* hadal-guest: makes boxes, and is the first process of every one.
 *
 *   hadal-guest spawn FD           take launch requests on this socket (SOCK_SEQPACKET)
 *   hadal-guest unpack DIRECTORY   an image layer from standard input, as tar
 *   hadal-guest tsc                kHz of the time stamp counter
 *   hadal-guest version
 *   hadal-guest join               in a virtual machine with a system of its own: serve it
 *   /init                          in an initial RAM disk: boot a virtual machine and be its first process
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <linux/capability.h>
#include <sys/prctl.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <poll.h>
#include <unistd.h>

#include "guest.h"
#include "launch.h"

#define REQUEST_MAX (512 * 1024)

static char *command_line; /* which the box can read: it says nothing of the host */
static size_t command_line_size;

static int listen_at(const char *path)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    if (strlen(path) >= sizeof address.sun_path) {
        errno = ENAMETOOLONG;
        return -1;
    }
    strcpy(address.sun_path, path);
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (fd < 0 || bind(fd, (struct sockaddr *)&address, sizeof address) || listen(fd, 16))
        return -1;
    return fd;
}

/* One process for each box, in namespaces of its own from the start. */
static pid_t clone_box(const struct launch *launch)
{
    unsigned long flags = CLONE_NEWNS | CLONE_NEWPID | CLONE_NEWUTS | CLONE_NEWIPC | SIGCHLD;
    if (launch->netns_fd < 0)
        flags |= CLONE_NEWNET;
    return (pid_t)syscall(SYS_clone, flags, NULL, NULL, NULL, NULL);
}

static void free_list(struct list *list)
{
    for (int i = 0; i < list->count; i++)
        free(list->items[i]);
}

static void free_launch(struct launch *l)
{
    free(l->hostname);
    free(l->scratch);
    free(l->run_directory);
    free(l->socket);
    free(l->netns);
    free_list(&l->lowers);
    free_list(&l->cgroups);
    free_list(&l->files);
    free_list(&l->binds);
    free_list(&l->tmpfs);
    free_list(&l->rlimits);
    free_list(&l->devices);
}

static void report_failure(struct launch *l, const char *phase, int error, const char *text)
{
    struct bytes fields = {0};
    put_number(&fields, T_ERRNO, (uint64_t)error);
    put_text(&fields, T_PHASE, phase);
    put_text(&fields, T_TEXT, text);
    send_event(l->reply, l->request, EVENT_FAILED, &fields);
    bytes_free(&fields);
}

static void launch_box(int control, const uint8_t *request, size_t length, const int *sent)
{
    struct launch l = {.reply = control, .netns_fd = -1, .scratch_fd = -1, .kept_fds = {-1, -1},
                       .listening = -1, .started = now_ns(), .phase = "start"};
    const char *wrong = read_launch(&l, request, length, sent);
    if (wrong) {
        report_failure(&l, "request", EINVAL, wrong);
    } else if (l.netns && (l.netns_fd = open(l.netns, O_RDONLY | O_CLOEXEC)) < 0) {
        report_failure(&l, "network", errno, l.netns);
    } else if ((l.listening = listen_at(l.socket)) < 0) {
        report_failure(&l, "socket", errno, l.socket);
    } else {
        pid_t pid = clone_box(&l);
        if (pid == 0) {
            memset(command_line, 0, command_line_size);
            strcpy(command_line, "init");
            become_box(&l);
        }
        struct bytes fields = {0};
        put_number(&fields, T_PID, (uint64_t)pid);
        if (pid > 0)
            send_event(control, l.request, EVENT_CLONED, &fields);
        else
            report_failure(&l, "clone", errno, "a process in new namespaces");
        bytes_free(&fields);
    }
    if (l.netns_fd >= 0)
        close(l.netns_fd);
    if (l.listening >= 0)
        close(l.listening);
    for (int i = 0; i < SENT_MAX; i++)
        if (sent[i] >= 0)
            close(sent[i]);
    free_launch(&l);
}

/* A request, and the descriptors that came with it. */
static ssize_t receive(int control, void *request, size_t size, int *sent)
{
    char buffer[CMSG_SPACE(SENT_MAX * sizeof(int))];
    struct iovec part = {.iov_base = request, .iov_len = size};
    struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1, .msg_control = buffer,
                             .msg_controllen = sizeof buffer};
    for (int i = 0; i < SENT_MAX; i++)
        sent[i] = -1;
    ssize_t n = recvmsg(control, &message, MSG_CMSG_CLOEXEC);
    struct cmsghdr *control_message = n > 0 ? CMSG_FIRSTHDR(&message) : NULL;
    if (control_message && control_message->cmsg_type == SCM_RIGHTS)
        memcpy(sent, CMSG_DATA(control_message), control_message->cmsg_len - CMSG_LEN(0));
    return n;
}

static void report_exits(int control)
{
    int status;
    for (pid_t pid; (pid = waitpid(-1, &status, WNOHANG)) > 0;) {
        struct bytes fields = {0};
        put_number(&fields, T_PID, (uint64_t)pid);
        put_number(&fields, T_STATUS, (uint64_t)status);
        send_event(control, 0, EVENT_EXITED, &fields);
        bytes_free(&fields);
    }
}

/* Mount options of a host's root must not allow more than they say: with CAP_SYS_RESOURCE an overlay's
 * owner writes beyond quotas. */
static void drop_resource_capability(void)
{
    struct __user_cap_header_struct header = {.version = _LINUX_CAPABILITY_VERSION_3};
    struct __user_cap_data_struct data[2];
    if (syscall(SYS_capget, &header, data))
        return;
    data[0].effective &= ~(1u << CAP_SYS_RESOURCE);
    data[0].permitted &= ~(1u << CAP_SYS_RESOURCE);
    data[0].inheritable &= ~(1u << CAP_SYS_RESOURCE);
    syscall(SYS_capset, &header, data);
}

/* Until the node daemon hangs up. The boxes live on; whoever adopts them finds them by their sockets. */
static int spawn(int control)
{
    static uint8_t request[REQUEST_MAX];
    sigset_t child;
    sigemptyset(&child);
    sigaddset(&child, SIGCHLD);
    sigprocmask(SIG_BLOCK, &child, NULL);
    signal(SIGPIPE, SIG_IGN);
    fcntl(control, F_SETFD, FD_CLOEXEC);
    drop_resource_capability();
    int signals = signalfd(-1, &child, SFD_CLOEXEC | SFD_NONBLOCK);
    struct pollfd wait[2] = {{.fd = control, .events = POLLIN}, {.fd = signals, .events = POLLIN}};
    for (;;) {
        if (poll(wait, 2, -1) < 0 && errno != EINTR)
            return 1;
        if (wait[1].revents) {
            struct signalfd_siginfo information;
            while (read(signals, &information, sizeof information) > 0)
                ;
            report_exits(control);
        }
        if (wait[0].revents) {
            int sent[SENT_MAX];
            ssize_t n = receive(control, request, sizeof request, sent);
            if (n == 0 || (n < 0 && errno != EINTR && errno != EAGAIN))
                return 0;
            if (n > 0)
                launch_box(control, request, (size_t)n, sent);
        }
    }
}

#ifdef __x86_64__
static uint64_t counter(void)
{
    return __builtin_ia32_rdtsc();
}
#endif

/* What a machine is told whose emulated processor has nothing to measure its counter by. */
static int print_tsc_khz(void)
{
#ifdef __x86_64__
    uint64_t ticks = counter(), ns = now_ns();
    usleep(100000);
    ticks = counter() - ticks;
    ns = now_ns() - ns;
    printf("%llu\n", (unsigned long long)((double)ticks / (double)ns * 1e6));
    return 0;
#else
    fprintf(stderr, "no time stamp counter on this architecture\n");
    return 1;
#endif
}

int main(int count, char **arguments)
{
    char *last = arguments[count - 1];
    command_line = arguments[0];
    command_line_size = (size_t)(last + strlen(last) - command_line);
    if (getpid() == 1 && !strcmp(arguments[0], "/init"))
        boot_machine();
    if (count == 3 && !strcmp(arguments[1], "spawn"))
        return spawn(atoi(arguments[2]));
    if (count == 3 && !strcmp(arguments[1], "unpack")) {
        if (chroot(arguments[2]) || chdir("/"))
            return applet_failed(arguments[2]);
        return unpack(".", true);
    }
    if (count == 2 && !strcmp(arguments[1], "tsc"))
        return print_tsc_khz();
    if (count == 2 && !strcmp(arguments[1], "join"))
        join_machine();
    if (count == 2 && !strcmp(arguments[1], "version")) {
        printf("hadal-guest protocol %d\n", PROTOCOL_VERSION);
        return 0;
    }
    fprintf(stderr, "usage: hadal-guest spawn FD | unpack DIRECTORY | tsc | join | version\n");
    return 2;
}
