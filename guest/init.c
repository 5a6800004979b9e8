#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/random.h>
#include <sys/reboot.h>
#include <sys/resource.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <linux/vm_sockets.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "guest.h"
#include "launch.h"

struct guest guest;

uint64_t clock_ns(int clock)
{
    struct timespec now;
    clock_gettime(clock, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

void watch(struct source *source, uint32_t events)
{
    struct epoll_event event = {.events = events, .data.ptr = source};
    if (source->fd < 0 || source->events == events)
        return;
    int operation = source->events ? (events ? EPOLL_CTL_MOD : EPOLL_CTL_DEL) : EPOLL_CTL_ADD;
    epoll_ctl(guest.epoll, operation, source->fd, &event);
    source->events = events;
}

void unwatch(struct source *source)
{
    if (source->fd < 0)
        return;
    watch(source, 0);
    close(source->fd);
    source->fd = -1;
}

/* Nobody is there now; commands wait a little for the next one. */
static void be_left(void)
{
    guest.lonely_since = clock_ns(CLOCK_MONOTONIC);
    guest.patience_ends = guest.lonely_since + PATIENCE_S * 1000000000ull;
    detach_all();
}

static void drop_connection(void)
{
    if (guest.connection.source.fd >= 0)
        be_left();
    if (!guest.connection.port) /* a port stays: the next connection comes through it */
        unwatch(&guest.connection.source);
    guest.connection.welcomed = false;
    bytes_free(&guest.connection.in);
    bytes_free(&guest.connection.out);
}

/* Nobody has come: commands go on, whatever becomes of their output. */
static void end_patience(void)
{
    guest.patience_ends = 0;
    wake_unattached();
}

/* Say why, as far as that goes out at once, and hang up. */
static void protocol_error(const char *text)
{
    struct connection *c = &guest.connection;
    size_t start = begin_frame(&c->out, F_ERROR, 0);
    put_text(&c->out, T_TEXT, text);
    end_frame(&c->out, start);
    if (c->port)
        flush_port(c);
    else
        send(c->source.fd, c->out.data, c->out.length, MSG_NOSIGNAL | MSG_DONTWAIT);
    drop_connection();
}

/* The numbers of a payload that has only numbers. */
struct numbers { uint64_t out, err, signal, rows, columns, least, most, nonce; };

static bool read_numbers(const uint8_t *payload, size_t length, struct numbers *n)
{
    const uint8_t *at = payload;
    struct field field;
    bool broken = false;
    while (next_field(&at, payload + length, &field, &broken)) {
        uint64_t number = read_number(field.value, field.length);
        switch (field.tag) {
        case T_OUT_OFFSET: n->out = number; break;
        case T_ERR_OFFSET: n->err = number; break;
        case T_SIGNAL: n->signal = number; break;
        case T_ROWS: n->rows = number; break;
        case T_COLUMNS: n->columns = number; break;
        case T_VERSION_MIN: n->least = number; break;
        case T_VERSION_MAX: n->most = number; break;
        case T_NONCE: n->nonce = number; break;
        default: return false;
        }
    }
    return !broken;
}

static void welcome(const struct numbers *n)
{
    struct connection *c = &guest.connection;
    if (c->port) { /* what there was before it has ended: a port does not say so itself */
        c->welcomed = false;
        bytes_free(&c->out);
        detach_all();
        begin_port(c);
    }
    if (n->least > PROTOCOL_VERSION || n->most < PROTOCOL_VERSION) {
        protocol_error("no common version of the protocol: this guest speaks version 1");
        return;
    }
    c->welcomed = true;
    size_t start = begin_frame(&c->out, F_WELCOME, 0);
    put_number(&c->out, T_VERSION, PROTOCOL_VERSION);
    put_text(&c->out, T_BOOT_ID, guest.boot_id);
    put_number(&c->out, T_LAST_ID, guest.last_id);
    put_number(&c->out, T_NONCE, n->nonce);
    end_frame(&c->out, start);
}

static void list_commands(void)
{
    struct bytes *out = &guest.connection.out;
    for (struct command *c = guest.commands; c; c = c->next) {
        if (c->forgotten)
            continue;
        size_t start = begin_frame(out, F_COMMAND, c->id);
        if (c->ended)
            put_number(out, T_STATUS, (uint64_t)c->status);
        end_frame(out, start);
    }
    end_frame(out, begin_frame(out, F_LISTED, 0));
}

static void settle(uint64_t id, const uint8_t *payload, size_t length)
{
    struct bytes *out = &guest.connection.out;
    if (!guest.machine) {
        protocol_error("this kernel is not the box's own");
        return;
    }
    const char *wrong = settle_machine(payload, length);
    size_t start = begin_frame(out, F_SETTLED, id);
    if (wrong) {
        put_number(out, T_ERRNO, (uint64_t)errno);
        put_text(out, T_TEXT, wrong);
    }
    put_number(out, T_TIME, clock_ns(CLOCK_REALTIME));
    end_frame(out, start);
}

static void handle_frame(int type, uint64_t id, const uint8_t *payload, size_t length)
{
    struct numbers n = {0};
    struct command *c = id ? find_command(id) : NULL;
    if (type != F_EXEC && type != F_INPUT && type != F_SETTLE && !read_numbers(payload, length, &n)) {
        protocol_error("a field that does not belong there");
        return;
    }
    if (type == F_HELLO) {
        welcome(&n);
        return;
    }
    if (!guest.connection.welcomed) {
        protocol_error("a frame before HELLO");
        return;
    }
    switch (type) {
    case F_EXEC: start_command(id, payload, length); break;
    case F_LIST: list_commands(); break;
    case F_SETTLE: settle(id, payload, length); break;
    case F_PING: end_frame(&guest.connection.out, begin_frame(&guest.connection.out, F_PONG, id)); break;
    /* The rest may come for a command that has just ended: nothing is left to do then. */
    case F_INPUT: if (c) give_input(c, payload, length); break;
    case F_INPUT_END: if (c) end_input(c); break;
    case F_RESIZE: case F_SIGNAL:
        if (c && type == F_SIGNAL)
            signal_command(c, (int)n.signal);
        else if (c)
            resize_command(c, (unsigned short)n.rows, (unsigned short)n.columns);
        break;
    case F_ATTACH: if (c) attach_command(c, n.out, n.err); break;
    case F_ACK: if (c) acknowledge(c, n.out, n.err); break;
    case F_FORGET: if (c && c->ended) c->forgotten = true; break;
    default: protocol_error("a frame of unknown type");
    }
}

/* All that are whole. */
void handle_frames(void)
{
    struct connection *c = &guest.connection;
    size_t used = 0;
    while (c->source.fd >= 0 && c->in.length - used >= HEADER_BYTES) {
        const uint8_t *header = c->in.data + used;
        size_t length = read_number(header, 4);
        if (length > FRAME_MAX) {
            protocol_error("a frame that is too long");
            return;
        }
        if (c->in.length - used < HEADER_BYTES + length)
            break;
        size_t end = used + HEADER_BYTES + length;
        handle_frame((int)read_number(header + 4, 2), read_number(header + 8, 8), header + HEADER_BYTES,
                     length);
        if (!c->in.length)
            return; /* the connection was dropped, and all that had come through it */
        used = end;
    }
    if (c->source.fd >= 0)
        bytes_drop(&c->in, used);
}

static ssize_t read_socket(struct connection *c)
{
    bytes_reserve(&c->in, 64 * 1024);
    ssize_t n = read(c->source.fd, c->in.data + c->in.length, c->in.capacity - c->in.length);
    if (n > 0)
        c->in.length += (size_t)n;
    return n;
}

static void read_connection(void)
{
    struct connection *c = &guest.connection;
    ssize_t n;
    do { /* a port is watched for changes only: all that has come is read */
        n = c->port ? read_port(c) : read_socket(c);
        if (n > 0)
            handle_frames();
    } while (n > 0 && c->port);
    if (n == 0 && c->port)
        be_left(); /* or the next one is there, and its HELLO has been faster than the news of it */
    else if (n == 0 || (n < 0 && errno != EAGAIN && errno != EINTR))
        drop_connection();
}

/* Whether the host is at the other end, and not a process of this machine. */
static bool is_host(int fd)
{
    struct sockaddr_vm peer = {0};
    socklen_t size = sizeof peer;
    return getpeername(fd, (struct sockaddr *)&peer, &size) == 0 && peer.svm_family == AF_VSOCK &&
           peer.svm_cid == VMADDR_CID_HOST;
}

static void accept_connection(void)
{
    int fd = accept4(guest.listening.fd, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK);
    if (fd < 0)
        return;
    if (guest.machine && !is_host(fd)) {
        close(fd);
        return;
    }
    drop_connection(); /* the daemon that had it is gone, or wants a new one */
    guest.connection.source = (struct source){.kind = S_CONNECTION, .fd = fd};
}

/* Send what goes out at once: whether anything did. */
static bool flush_socket(struct connection *c)
{
    ssize_t n = send(c->source.fd, c->out.data, c->out.length, MSG_NOSIGNAL | MSG_DONTWAIT);
    if (n < 0 && errno != EAGAIN && errno != EINTR)
        drop_connection();
    else if (n > 0)
        bytes_drop(&c->out, (size_t)n);
    return n > 0;
}

static bool output_left(const struct connection *c)
{
    return c->out.length || (c->port && port_output_left(c->port));
}

/* Frames go out in turns, a little of each command at a time, so that none waits behind a flood. */
static void write_connection(void)
{
    struct connection *c = &guest.connection;
    while (c->source.fd >= 0) {
        bool more = true;
        while (more && c->out.length < 128 * 1024) {
            more = false;
            for (struct command *command = guest.commands; command; command = command->next)
                more |= send_pending(command);
        }
        if (!output_left(c) || !(c->port ? flush_port(c) : flush_socket(c)))
            break;
    }
    watch(&c->source, EPOLLIN | (output_left(c) ? EPOLLOUT : 0) | (c->port ? EPOLLET : 0));
}

static void reap(void)
{
    struct signalfd_siginfo information;
    while (read(guest.signals.fd, &information, sizeof information) > 0)
        ;
    int status;
    struct rusage used;
    for (pid_t pid; (pid = wait4(-1, &status, WNOHANG | WUNTRACED, &used)) > 0;)
        for (struct command *c = guest.commands; c; c = c->next)
            if (c->pid == pid && !c->ended && WIFSTOPPED(status)) {
                if (c->applet)
                    kill(pid, SIGKILL); /* whoever waits for it has no time limit: it fails instead */
                break;
            } else if (c->pid == pid && !c->ended) {
                c->user_us = (uint64_t)used.ru_utime.tv_sec * 1000000 + (uint64_t)used.ru_utime.tv_usec;
                c->system_us = (uint64_t)used.ru_stime.tv_sec * 1000000 + (uint64_t)used.ru_stime.tv_usec;
                c->max_rss_kb = (uint64_t)used.ru_maxrss;
                command_died(c, status);
                break;
            }
}

static void handle_event(struct source *source)
{
    if (source->fd < 0)
        return; /* closed by an event before this one */
    switch (source->kind) {
    case S_LISTEN: accept_connection(); break;
    case S_CONNECTION: read_connection(); break;
    case S_SIGNALS: reap(); break;
    case S_STREAM: read_stream((struct stream *)source); break;
    case S_INPUT: write_input(source->command); break;
    case S_REPORT: take_report(source->command); break;
    case S_PRESSURE: relieve_pressure(); break;
    }
}

/* Asked when the lease is over: a port may have been taken up again without a word. */
static bool is_lonely(void)
{
    struct pollfd port = {.fd = guest.connection.source.fd, .events = 0};
    guest.lonely_since = clock_ns(CLOCK_MONOTONIC);
    return port.fd < 0 || (poll(&port, 1, 0) == 1 && port.revents & POLLHUP);
}

static _Noreturn void leave(void)
{
    if (guest.machine)
        reboot(guest.listening.fd >= 0 ? RB_AUTOBOOT : RB_POWER_OFF); /* Firecracker has nothing that powers off */
    _exit(73);
}

void serve_box(int listening, const int *kept, int oom_score, int priority, uint64_t lease_ns)
{
    memcpy(guest.kept, kept, sizeof guest.kept);
    guest.listening = (struct source){.kind = S_LISTEN, .fd = listening};
    guest.connection.source = (struct source){.kind = S_CONNECTION, .fd = -1};
    guest.commands_group = -1;
    serve(oom_score, priority, lease_ns);
}

void serve(int oom_score, int priority, uint64_t lease_ns)
{
    sigset_t all;
    sigfillset(&all);
    sigprocmask(SIG_SETMASK, &all, NULL);
    guest.epoll = epoll_create1(EPOLL_CLOEXEC);
    guest.oom_score = oom_score;
    guest.priority = priority;
    guest.signals = (struct source){.kind = S_SIGNALS};
    sigset_t child;
    sigemptyset(&child);
    sigaddset(&child, SIGCHLD);
    guest.signals.fd = signalfd(-1, &child, SFD_CLOEXEC | SFD_NONBLOCK);
    uint8_t random[16];
    if (guest.epoll < 0 || guest.signals.fd < 0 || getrandom(random, sizeof random, 0) != sizeof random)
        _exit(72);
    for (size_t i = 0; i < sizeof random; i++)
        snprintf(guest.boot_id + 2 * i, 3, "%02x", random[i]);
    struct rlimit files;
    if (getrlimit(RLIMIT_NOFILE, &files) == 0) {
        files.rlim_cur = files.rlim_max;
        setrlimit(RLIMIT_NOFILE, &files);
    }
    guest.lease_ns = lease_ns;
    guest.lonely_since = clock_ns(CLOCK_MONOTONIC);
    watch(&guest.listening, EPOLLIN);
    watch(&guest.connection.source, EPOLLIN | EPOLLET);
    watch(&guest.signals, EPOLLIN);
    if (guest.machine && getpid() == 1) /* else it is for the system whose service this is */
        watch_pressure();
    for (;;) {
        struct epoll_event events[64];
        int count = epoll_wait(guest.epoll, events, 64, next_deadline_ms());
        for (int i = 0; i < count; i++)
            handle_event(events[i].data.ptr);
        enforce_times();
        if (guest.patience_ends && clock_ns(CLOCK_MONOTONIC) >= guest.patience_ends)
            end_patience();
        if (guest.lease_ns && clock_ns(CLOCK_MONOTONIC) - guest.lonely_since > guest.lease_ns &&
            is_lonely())
            leave(); /* nobody will ever come for this box: it takes its processes with it */
        write_connection();
        sweep_commands();
    }
}
