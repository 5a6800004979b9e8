#define _GNU_SOURCE
#include "launch.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/capability.h>
#include <linux/if.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "protocol.h"

uint64_t now_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

static bool add(struct list *list, const struct field *field)
{
    if (list->count == MANY)
        return false;
    char *item = allocate(field->length + 1);
    memcpy(item, field->value, field->length);
    list->sizes[list->count] = field->length;
    list->items[list->count++] = item;
    return true;
}

/* Of what came with the request, the disk first. */
static const char *take_descriptors(struct launch *l, const int *sent)
{
    uint64_t count = 0;
    while (count < SENT_MAX && sent[count] >= 0)
        count++;
    if (l->keep > KEPT_MAX || l->keep > count || count - l->keep > 1)
        return "other descriptors than it says";
    l->scratch_fd = count > l->keep ? sent[0] : -1;
    for (uint64_t i = 0; i < l->keep; i++)
        l->kept_fds[i] = sent[count - l->keep + i];
    return NULL;
}

/* What a box may be given of the host's devices. */
static bool is_known_device(const char *name)
{
    return !strcmp(name, "kvm") || !strcmp(name, "net/tun");
}

const char *read_launch(struct launch *l, const uint8_t *payload, size_t length, const int *sent)
{
    const uint8_t *at = payload, *end = payload + length;
    struct field field;
    bool broken = false, full = false;
    while (next_field(&at, end, &field, &broken)) {
        uint64_t number = read_number(field.value, field.length);
        switch (field.tag) {
        case T_REQUEST: l->request = number; break;
        case T_HOSTNAME: l->hostname = field_text(&field); break;
        case T_LOWER: full |= !add(&l->lowers, &field); break;
        case T_SCRATCH: l->scratch = field_text(&field); break;
        case T_SCRATCH_BYTES: l->scratch_bytes = number; break;
        case T_SCRATCH_INODES: l->scratch_inodes = number; break;
        case T_RUN_DIRECTORY: l->run_directory = field_text(&field); break;
        case T_SOCKET: l->socket = field_text(&field); break;
        case T_UID_BASE: l->uid_base = number; l->user_namespace = true; break;
        case T_UID_COUNT: l->uid_count = number; break;
        case T_CGROUP: full |= !add(&l->cgroups, &field); break;
        case T_NETNS: l->netns = field_text(&field); break;
        case T_SHM_BYTES: l->shm_bytes = number; break;
        case T_FILE: full |= !add(&l->files, &field); break;
        case T_BIND: full |= !add(&l->binds, &field); break;
        case T_TMPFS: full |= !add(&l->tmpfs, &field); break;
        case T_DEVICE: full |= !add(&l->devices, &field); break;
        case T_RLIMIT: full |= !add(&l->rlimits, &field); break;
        case T_VOLATILE: l->volatile_overlay = number; break;
        case T_LEASE_S: l->lease_s = number; break;
        case T_KEEP: l->keep = number; break;
        case T_READ_ONLY: l->read_only = number; break;
        default: return "a field that a launch request does not have";
        }
    }
    const char *wrong = take_descriptors(l, sent);
    if (wrong)
        return wrong;
    if (broken)
        return "a field that goes beyond the request";
    if (full)
        return "more than 128 of a repeated field";
    if (!l->hostname || !l->run_directory || !l->socket || !l->lowers.count)
        return "a request without hostname, run directory, socket or layer";
    for (int i = 0; i < l->devices.count; i++)
        if (!is_known_device(l->devices.items[i]))
            return "a device that boxes do not get";
    if (!l->scratch && !l->scratch_bytes && l->scratch_fd < 0)
        return "a request without scratch";
    return NULL;
}

bool has_device(const struct launch *l, const char *name)
{
    for (int i = 0; i < l->devices.count; i++)
        if (!strcmp(l->devices.items[i], name))
            return true;
    return false;
}

void send_event(int reply, uint64_t request, int event, struct bytes *fields)
{
    struct bytes message = {0};
    put_number(&message, T_REQUEST, request);
    put_number(&message, T_EVENT, (uint64_t)event);
    if (fields)
        bytes_add(&message, fields->data, fields->length);
    send(reply, message.data, message.length, MSG_NOSIGNAL);
    bytes_free(&message);
}

void launch_failed(struct launch *l, const char *detail)
{
    struct bytes fields = {0};
    put_number(&fields, T_ERRNO, (uint64_t)errno);
    put_text(&fields, T_PHASE, l->phase);
    put_text(&fields, T_TEXT, detail ? detail : "");
    send_event(l->reply, l->request, EVENT_FAILED, &fields);
    _exit(71);
}

static void write_all(struct launch *l, const char *path, const char *text)
{
    int fd = open(path, O_WRONLY | O_CLOEXEC);
    if (fd < 0 || write(fd, text, strlen(text)) != (ssize_t)strlen(text))
        launch_failed(l, path);
    close(fd);
}

/* Limits of a user (inotify, signals, timers, queues) are counted for whoever owns a user namespace, too:
 * were that the host's root, one box could use them up for the host and all others. */
static bool unshare_as_owner(uint64_t owner)
{
    struct __user_cap_header_struct header = {.version = _LINUX_CAPABILITY_VERSION_3};
    struct __user_cap_data_struct data[2];
    if (setresuid((uid_t)-1, (uid_t)owner, (uid_t)-1) || syscall(SYS_capget, &header, data))
        return false;
    for (int i = 0; i < 2; i++)
        data[i].effective = data[i].permitted;
    return syscall(SYS_capset, &header, data) == 0 && unshare(CLONE_NEWUSER) == 0;
}

/* A user namespace with this box's ids, kept as a file descriptor: the mounts need it before we are in
 * it. Its map must be written from outside, so a child makes it; /proc is still the host's and names
 * the child by its pid there. */
static int make_user_namespace(struct launch *l)
{
    int told[2], wait[2];
    if (pipe2(told, O_CLOEXEC) || pipe2(wait, O_CLOEXEC))
        launch_failed(l, "pipe");
    pid_t child = fork();
    if (child < 0)
        launch_failed(l, "fork");
    if (child == 0) {
        char self[32] = {0};
        close(wait[1]);
        bool made = unshare_as_owner(l->uid_base) && readlink("/proc/self", self, sizeof self - 1) > 0;
        if (!made)
            snprintf(self, sizeof self, "-%d", errno);
        (void)!write(told[1], self, sizeof self);
        (void)!read(wait[0], self, 1); /* until the parent has what it needs */
        _exit(0);
    }
    char pid[32] = {0}, path[64], map[64];
    close(wait[0]);
    if (read(told[0], pid, sizeof pid) != sizeof pid)
        launch_failed(l, "no user namespace");
    if (pid[0] == '-') {
        errno = atoi(pid + 1);
        launch_failed(l, "unshare user namespace");
    }
    snprintf(map, sizeof map, "0 %llu %llu", (unsigned long long)l->uid_base,
             (unsigned long long)l->uid_count);
    snprintf(path, sizeof path, "/proc/%s/uid_map", pid);
    write_all(l, path, map);
    snprintf(path, sizeof path, "/proc/%s/gid_map", pid);
    write_all(l, path, map);
    snprintf(path, sizeof path, "/proc/%s/ns/user", pid);
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        launch_failed(l, path);
    close(wait[1]);
    close(told[0]);
    close(told[1]);
    waitpid(child, NULL, 0);
    return fd;
}

/* Joining a group waits for a grace period of the kernel, some milliseconds: a child does it meanwhile.
 * It names its parent as everybody in here does: 1. */
static pid_t start_joining(struct launch *l)
{
    int groups[MANY];
    l->phase = "cgroup";
    for (int i = 0; i < l->cgroups.count; i++)
        if ((groups[i] = open(l->cgroups.items[i], O_WRONLY | O_CLOEXEC)) < 0)
            launch_failed(l, l->cgroups.items[i]);
    pid_t child = fork();
    if (child < 0)
        launch_failed(l, "fork");
    for (int i = 0; i < l->cgroups.count; i++) {
        if (child == 0 && write(groups[i], "1", 1) != 1)
            launch_failed(l, l->cgroups.items[i]);
        close(groups[i]);
    }
    if (child == 0)
        _exit(0);
    return child;
}

static void finish_joining(struct launch *l, pid_t child)
{
    int status;
    l->phase = "cgroup";
    if (waitpid(child, &status, 0) != child)
        launch_failed(l, "wait");
    if (status)
        _exit(71); /* the child has said why */
    if (unshare(CLONE_NEWCGROUP))
        launch_failed(l, "unshare cgroup namespace");
}

static void loopback_up(struct launch *l)
{
    int fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    struct ifreq request = {0};
    strcpy(request.ifr_name, "lo");
    if (fd < 0 || ioctl(fd, SIOCGIFFLAGS, &request))
        launch_failed(l, "lo");
    request.ifr_flags |= IFF_UP;
    if (ioctl(fd, SIOCSIFFLAGS, &request))
        launch_failed(l, "lo up");
    close(fd);
}

static void set_limits(struct launch *l)
{
    static const struct { const char *name; int resource; } known[] = {
        {"nofile", RLIMIT_NOFILE}, {"fsize", RLIMIT_FSIZE}, {"stack", RLIMIT_STACK},
        {"memlock", RLIMIT_MEMLOCK}, {"msgqueue", RLIMIT_MSGQUEUE}, {"sigpending", RLIMIT_SIGPENDING},
        {"core", RLIMIT_CORE},
    };
    for (int i = 0; i < l->rlimits.count; i++) {
        char name[32];
        unsigned long long soft, hard;
        size_t k = 0, n = sizeof known / sizeof *known;
        if (sscanf(l->rlimits.items[i], "%31[a-z]=%llu:%llu", name, &soft, &hard) == 3)
            while (k < n && strcmp(known[k].name, name))
                k++;
        else
            k = n;
        struct rlimit limit = {soft, hard};
        if (k == n)
            errno = EINVAL;
        if (k == n || setrlimit((__rlimit_resource_t)known[k].resource, &limit))
            launch_failed(l, l->rlimits.items[i]);
    }
}

void become_box(struct launch *l)
{
    /* The init has no other open files than what it needs: nothing of the host leaks into the box. */
    l->phase = "files";
    int *kept[] = {&l->listening, &l->reply, &l->netns_fd, &l->scratch_fd, &l->kept_fds[0], &l->kept_fds[1]};
    int count = (int)(sizeof kept / sizeof *kept), null = open("/dev/null", O_RDWR);
    for (int i = 0; i < count; i++)
        if (*kept[i] >= 0 && (*kept[i] = fcntl(*kept[i], F_DUPFD, 16)) < 0)
            launch_failed(l, "keep a file");
    for (int i = 0; i < 3; i++)
        if (null < 0 || dup2(null, i) < 0)
            launch_failed(l, "/dev/null");
    for (int i = 0; i < count; i++) { /* 0 to 2 are /dev/null */
        if (*kept[i] < 0 && close(3 + i) && errno != EBADF)
            launch_failed(l, "close");
        if (*kept[i] >= 0 && (*kept[i] = dup3(*kept[i], 3 + i, O_CLOEXEC)) < 0)
            launch_failed(l, "keep a file");
    }
    if (close_range((unsigned)(3 + count), ~0u, 0))
        launch_failed(l, "close_range");
    int network = l->netns_fd;
    setsid();
    prctl(PR_SET_NAME, "init");

    pid_t joining = start_joining(l);
    l->phase = "namespaces";
    if (network >= 0 && setns(network, CLONE_NEWNET))
        launch_failed(l, l->netns);
    if (network >= 0)
        close(network);
    else
        loopback_up(l);
    if (sethostname(l->hostname, strlen(l->hostname)))
        launch_failed(l, "hostname");
    int users = l->user_namespace ? make_user_namespace(l) : -1;

    build_root(l, users);
    enter_root(l);

    finish_joining(l, joining);
    l->phase = "limits";
    set_limits(l);
    join_new_keyring();
    /* Commands are to be killed before the init when memory runs out: see serve_box. */
    int oom_score = open("/proc/self/oom_score_adj", O_WRONLY | O_CLOEXEC);

    /* However many processes of the box want to run, the init has its turn: it ends those whose time is
     * over. Within the box's share only. */
    int priority = getpriority(PRIO_PROCESS, 0);
    setpriority(PRIO_PROCESS, 0, -20);

    l->phase = "privileges";
    if (users >= 0) {
        if (setns(users, CLONE_NEWUSER))
            launch_failed(l, "enter user namespace");
        close(users);
    }
    drop_privileges(l);
    struct bytes fields = {0};
    put_number(&fields, T_ELAPSED_US, (now_ns() - l->started) / 1000);
    send_event(l->reply, l->request, EVENT_READY, &fields);
    bytes_free(&fields);
    close(l->reply);
    int listening = l->listening;
    serve_box(listening, l->kept_fds, oom_score, priority, l->lease_s * 1000000000u);
}
