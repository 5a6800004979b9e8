#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/ioctl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <termios.h>
#include <time.h>
#include <unistd.h>

#include "guest.h"

/* What F_EXEC asks for. */
struct order {
    char **arguments, **environment;
    int argument_count, environment_count;
    char *directory, *user;
    bool tty, input, applet, kept;
    uint64_t rows, columns, timeout_ms, quiet_ms, output_limit, nofile;
};

struct command *find_command(uint64_t id)
{
    for (struct command *c = guest.commands; c; c = c->next)
        if (c->id == id && !c->forgotten)
            return c;
    return NULL;
}

static void refuse(uint64_t id, int error, const char *text)
{
    struct bytes *out = &guest.connection.out;
    size_t start = begin_frame(out, F_FAILED, id);
    put_number(out, T_ERRNO, (uint64_t)error);
    put_text(out, T_TEXT, text);
    end_frame(out, start);
}

static void add_text(char ***list, int *count, const struct field *field, bool *broken)
{
    char *text = field_text(field);
    if (!text)
        *broken = true;
    /* Room for the next power of two, and always for the NULL at the end. */
    if ((*count & (*count + 1)) == 0) {
        char **larger = allocate(sizeof(char *) * (size_t)(2 * (*count + 1) + 1));
        if (*count)
            memcpy(larger, *list, sizeof(char *) * (size_t)*count);
        free(*list);
        *list = larger;
    }
    (*list)[(*count)++] = text;
}

static void set_text(char **text, const struct field *field, bool *broken)
{
    free(*text);
    *text = field_text(field);
    *broken |= !*text; /* and not what is meant where there is none: root */
}

static bool read_order(struct order *o, const uint8_t *payload, size_t length)
{
    const uint8_t *at = payload;
    struct field field;
    bool broken = false;
    while (next_field(&at, payload + length, &field, &broken)) {
        uint64_t number = read_number(field.value, field.length);
        switch (field.tag) {
        case T_ARGUMENT: add_text(&o->arguments, &o->argument_count, &field, &broken); break;
        case T_ENVIRONMENT: add_text(&o->environment, &o->environment_count, &field, &broken); break;
        case T_DIRECTORY: set_text(&o->directory, &field, &broken); break;
        case T_USER: set_text(&o->user, &field, &broken); break;
        case T_TTY: o->tty = number; break;
        case T_INPUT: o->input = number; break;
        case T_APPLET: o->applet = number; break;
        case T_ROWS: o->rows = number; break;
        case T_COLUMNS: o->columns = number; break;
        case T_TIMEOUT_MS: o->timeout_ms = number; break;
        case T_QUIET_MS: o->quiet_ms = number; break;
        case T_OUTPUT_LIMIT: o->output_limit = number; break;
        case T_NOFILE: o->nofile = number; break;
        case T_KEPT: o->kept = number; break;
        default: broken = true;
        }
    }
    return !broken && o->argument_count;
}

static void free_order(struct order *o)
{
    for (int i = 0; i < o->argument_count; i++)
        free(o->arguments[i]);
    for (int i = 0; i < o->environment_count; i++)
        free(o->environment[i]);
    free(o->arguments);
    free(o->environment);
    free(o->directory);
    free(o->user);
}

/* In the child: the reason goes to the init through the report pipe. */
static _Noreturn void child_failed(int report, const char *text)
{
    struct { int error; char text[252]; } message = {.error = errno};
    snprintf(message.text, sizeof message.text, "%s", text);
    (void)!write(report, &message, sizeof message);
    _exit(127);
}

static const char *variable(char **environment, const char *name)
{
    size_t length = strlen(name);
    for (; environment && *environment; environment++)
        if (!strncmp(*environment, name, length) && (*environment)[length] == '=')
            return *environment + length + 1;
    return NULL;
}

static void become_user(const struct user *user, int report)
{
    if (setgroups((size_t)user->group_count, user->groups) || setresgid(user->gid, user->gid, user->gid) ||
        setresuid(user->uid, user->uid, user->uid))
        child_failed(report, "change user");
}

static _Noreturn void execute(struct order *o, int report)
{
    const char *name = o->arguments[0], *path = variable(o->environment, "PATH");
    char full[4096];
    if (strchr(name, '/')) {
        execve(name, o->arguments, o->environment);
        child_failed(report, name);
    }
    int error = ENOENT;
    for (const char *at = path; at && *name; at = strchr(at, ':') ? strchr(at, ':') + 1 : NULL) {
        int length = (int)strcspn(at, ":");
        if (snprintf(full, sizeof full, "%.*s/%s", length, length ? at : ".", name) >= (int)sizeof full)
            continue;
        execve(full, o->arguments, o->environment);
        if (errno != ENOENT && errno != ENOTDIR)
            error = errno;
        if (error != ENOENT && error != EACCES)
            break;
    }
    errno = error;
    child_failed(report, name);
}

/* In the child, files 0 to 2 are in place, and `report` is the only other one. */
static _Noreturn void run_child(struct order *o, int report)
{
    struct user user;
    const char *wrong = find_user(o->user ? o->user : "0", &user);
    if (wrong) {
        errno = EINVAL;
        child_failed(report, wrong);
    }
    struct rlimit files = {o->nofile ? o->nofile : 1024, 0}, hard;
    getrlimit(RLIMIT_NOFILE, &hard);
    files.rlim_max = hard.rlim_max;
    if (files.rlim_cur > files.rlim_max)
        files.rlim_cur = files.rlim_max;
    setrlimit(RLIMIT_NOFILE, &files);
    become_user(&user, report);
    if (chdir(o->directory ? o->directory : "/"))
        child_failed(report, o->directory);
    if (!o->applet)
        setpriority(PRIO_PROCESS, 0, guest.priority);
    // A daemon that was started in the background ignores interrupts; its boxes' commands must not.
    for (int number = 1; number < NSIG; number++)
        if (number != SIGKILL && number != SIGSTOP)
            signal(number, SIG_DFL);
    if (o->applet)
        signal(SIGPIPE, SIG_IGN);
    sigset_t none;
    sigemptyset(&none);
    sigprocmask(SIG_SETMASK, &none, NULL);
    if (o->applet) {
        close(report);
        _exit(run_applet(o->argument_count, o->arguments));
    }
    char home[300];
    struct field field = {.value = (uint8_t *)home};
    bool broken = false;
    if (!variable(o->environment, "HOME")) {
        field.length = (uint32_t)snprintf(home, sizeof home, "HOME=%s", user.home);
        add_text(&o->environment, &o->environment_count, &field, &broken);
    }
    if (!variable(o->environment, "PATH")) {
        field.length = (uint32_t)snprintf(
            home, sizeof home, "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin");
        add_text(&o->environment, &o->environment_count, &field, &broken);
    }
    execute(o, report);
}

struct ends { int child[3], parent[3]; }; /* of standard input, output and error */

static bool open_terminal(struct order *o, struct ends *e)
{
    char name[64];
    unsigned number;
    int zero = 0, master = open("/dev/ptmx", O_RDWR | O_NOCTTY | O_CLOEXEC | O_NONBLOCK);
    struct winsize size = {.ws_row = (unsigned short)o->rows, .ws_col = (unsigned short)o->columns};
    if (master < 0)
        return false;
    if (ioctl(master, TIOCSPTLCK, &zero) || ioctl(master, TIOCGPTN, &number))
        return false;
    snprintf(name, sizeof name, "/dev/pts/%u", number);
    int slave = open(name, O_RDWR | O_NOCTTY | O_CLOEXEC);
    if (slave < 0)
        return false;
    ioctl(master, TIOCSWINSZ, &size);
    e->child[0] = slave;
    e->child[1] = dup(slave);
    e->child[2] = dup(slave);
    e->parent[0] = fcntl(master, F_DUPFD_CLOEXEC, 0);
    e->parent[1] = master;
    return e->child[1] >= 0 && e->child[2] >= 0 && e->parent[0] >= 0;
}

static bool open_pipe(int *child, int *parent, bool to_child)
{
    int fds[2];
    if (pipe2(fds, O_CLOEXEC))
        return false;
    *child = fds[to_child ? 0 : 1];
    *parent = fds[to_child ? 1 : 0];
    fcntl(*parent, F_SETFL, O_NONBLOCK);
    return true;
}

static bool open_ends(struct order *o, struct ends *e)
{
    for (int i = 0; i < 3; i++)
        e->child[i] = e->parent[i] = -1;
    if (o->tty)
        return open_terminal(o, e);
    if (o->input ? !open_pipe(&e->child[0], &e->parent[0], true)
                 : (e->child[0] = open("/dev/null", O_RDONLY | O_CLOEXEC)) < 0)
        return false;
    return open_pipe(&e->child[1], &e->parent[1], false) && open_pipe(&e->child[2], &e->parent[2], false);
}

static void close_all(int *fds)
{
    for (int i = 0; i < 3; i++)
        if (fds[i] >= 0)
            close(fds[i]);
}

/* A process is killed before the init when memory runs out: children inherit the score that the init
 * has for a moment only. */
static void set_oom_score(const char *score)
{
    if (guest.oom_score >= 0)
        (void)!write(guest.oom_score, score, strlen(score));
}

static pid_t fork_child(struct order *o, struct ends *e, int report)
{
    set_oom_score("500");
    pid_t pid = fork();
    if (pid) {
        int error = errno;
        set_oom_score("0");
        errno = error;
        return pid;
    }
    if (o->kept && guest.kept[0] < 0) {
        errno = EBADF;
        child_failed(report, "the descriptor of the box");
    }
    /* Applets are not in it: they work while commands are held. */
    if (guest.commands_group >= 0 && !o->applet && write(guest.commands_group, "0", 1) != 1)
        child_failed(report, "join the group of commands");
    setsid();
    /* Above the numbers that they are moved to. */
    int high[4 + KEPT_MAX] = {fcntl(e->child[0], F_DUPFD, 10), fcntl(e->child[1], F_DUPFD, 10),
                              fcntl(e->child[2], F_DUPFD, 10), fcntl(report, F_DUPFD, 10)};
    int count = 4;
    for (int i = 0; o->kept && i < KEPT_MAX && guest.kept[i] >= 0; i++)
        high[count++] = fcntl(guest.kept[i], F_DUPFD, 10);
    for (int i = 0; i < count; i++)
        dup2(high[i], i);
    close_range((unsigned)count, ~0u, 0);
    fcntl(3, F_SETFD, FD_CLOEXEC);
    if (o->tty)
        ioctl(0, TIOCSCTTY, 0);
    run_child(o, 3);
}

static void watch_output(struct command *c, int index, int fd, const struct order *o)
{
    struct stream *s = &c->out[index];
    s->source = (struct source){.kind = S_STREAM, .fd = fd, .command = c};
    s->limit = o->output_limit;
    watch(&s->source, EPOLLIN);
}

static void begin(struct command *c, struct order *o, struct ends *e, int report)
{
    uint64_t now = clock_ns(CLOCK_MONOTONIC);
    c->start_time = clock_ns(CLOCK_REALTIME);
    c->oom_kills = guest.machine ? count_oom_kills() : 0;
    c->tty = o->tty;
    c->applet = o->applet;
    c->attached = true;
    c->deadline = o->timeout_ms ? now + o->timeout_ms * 1000000 : 0;
    c->quiet = o->quiet_ms * 1000000;
    c->quiet_due = c->quiet ? now + c->quiet : 0;
    for (int i = 0; i < 2; i++)
        watch_output(c, i, e->parent[i + 1], o);
    c->input = (struct source){.kind = S_INPUT, .fd = e->parent[0], .command = c};
    c->report = (struct source){.kind = S_REPORT, .fd = report, .command = c};
    watch(&c->report, EPOLLIN);
    c->next = guest.commands;
    guest.commands = c;
}

void start_command(uint64_t id, const uint8_t *payload, size_t length)
{
    struct order order = {0};
    struct ends ends;
    int report[2] = {-1, -1};
    if (id <= guest.last_id) {
        refuse(id, EEXIST, "a command of this id has been here before");
        return;
    }
    guest.last_id = id;
    if (!read_order(&order, payload, length)) {
        refuse(id, EINVAL, "fields that do not make a command");
    } else if (!open_ends(&order, &ends) || pipe2(report, O_CLOEXEC | O_NONBLOCK)) {
        refuse(id, errno, "open pipes or a terminal");
        close_all(ends.child);
        close_all(ends.parent);
    } else {
        struct command *c = allocate(sizeof *c);
        c->id = id;
        c->pid = fork_child(&order, &ends, report[1]);
        int error = errno;
        close_all(ends.child);
        close(report[1]);
        if (c->pid < 0) {
            refuse(id, error, "start a process");
            close_all(ends.parent);
            close(report[0]);
            free(c);
        } else {
            begin(c, &order, &ends, report[0]);
        }
    }
    free_order(&order);
}

/* The child is running its program, or says why not. */
void take_report(struct command *c)
{
    struct { int error; char text[252]; } message;
    ssize_t n = read(c->report.fd, &message, sizeof message);
    if (n < 0 && (errno == EAGAIN || errno == EINTR))
        return;
    unwatch(&c->report);
    if (n == (ssize_t)sizeof message) {
        message.text[sizeof message.text - 1] = 0;
        c->failed = c->forgotten = true;
        refuse(c->id, message.error, message.text);
        return;
    }
    c->started = true;
    size_t start = begin_frame(&guest.connection.out, F_STARTED, c->id);
    put_number(&guest.connection.out, T_PID, (uint64_t)c->pid);
    put_number(&guest.connection.out, T_TIME, c->start_time);
    end_frame(&guest.connection.out, start);
}

void command_died(struct command *c, int status)
{
    if (c->report.fd >= 0)
        take_report(c);
    c->status = status;
    c->oom_kills = guest.machine ? count_oom_kills() - c->oom_kills : 0;
    c->end_time = clock_ns(CLOCK_REALTIME);
    c->ended = true;
    c->deadline = c->quiet_due = 0;
    for (int i = 0; i < 2; i++) {
        c->out[i].drain = 1 << 20; /* the largest pipe */
        settle_stream(&c->out[i]);
    }
    unwatch(&c->input);
    bytes_free(&c->pending);
}

void give_input(struct command *c, const uint8_t *data, size_t length)
{
    if (c->input.fd < 0 || c->input_ends) {
        c->input_taken += length; /* nobody reads it any more */
        return;
    }
    bytes_add(&c->pending, data, length);
    write_input(c);
}

static void acknowledge_input(struct command *c)
{
    if (c->input_taken - c->input_acknowledged < WINDOW / 4)
        return;
    struct bytes *out = &guest.connection.out;
    size_t start = begin_frame(out, F_INPUT_ACK, c->id);
    put_number(out, T_OFFSET, c->input_taken);
    end_frame(out, start);
    c->input_acknowledged = c->input_taken;
}

void write_input(struct command *c)
{
    size_t done = 0;
    while (done < c->pending.length) {
        ssize_t n = write(c->input.fd, c->pending.data + done, c->pending.length - done);
        if (n < 0 && (errno == EAGAIN || errno == EINTR))
            break;
        if (n < 0) { /* closed by the command: as with a shell's pipe, the rest is lost */
            done = c->pending.length;
            unwatch(&c->input);
            break;
        }
        done += (size_t)n;
    }
    c->input_taken += done;
    if (done)
        bytes_drop(&c->pending, done);
    acknowledge_input(c);
    if (c->input_ends && !c->pending.length)
        unwatch(&c->input);
    else
        watch(&c->input, c->pending.length ? EPOLLOUT : 0);
}

void end_input(struct command *c)
{
    static const uint8_t end_of_text = 4;
    if (c->tty)
        give_input(c, &end_of_text, 1);
    else if (c->input.fd >= 0) {
        c->input_ends = true;
        write_input(c);
    }
}

void resize_command(struct command *c, unsigned short rows, unsigned short columns)
{
    struct winsize size = {.ws_row = rows, .ws_col = columns};
    if (c->tty && c->out[0].source.fd >= 0)
        ioctl(c->out[0].source.fd, TIOCSWINSZ, &size);
}

/* Every process of the session, whatever group it has put itself in. */
static void kill_session(pid_t session)
{
    for (int round = 0; round < 3; round++) {
        bool found = false;
        DIR *directory = opendir("/proc");
        for (struct dirent *entry; directory && (entry = readdir(directory));) {
            char path[300], text[512] = {0};
            int pid = atoi(entry->d_name), in_session = 0;
            if (pid <= 1)
                continue;
            snprintf(path, sizeof path, "/proc/%d/stat", pid);
            int fd = open(path, O_RDONLY | O_CLOEXEC);
            ssize_t n = fd < 0 ? 0 : read(fd, text, sizeof text - 1);
            if (fd >= 0)
                close(fd);
            const char *after = n > 0 ? strrchr(text, ')') : NULL; /* the name may hold anything */
            if (!after || sscanf(after, ") %*c %*d %*d %d", &in_session) != 1 || in_session != session)
                continue;
            found |= after[2] != 'Z';
            kill(pid, SIGKILL);
        }
        if (directory)
            closedir(directory);
        if (!found)
            return;
    }
}

void signal_command(struct command *c, int number)
{
    if (c->ended || number <= 0 || number > 64)
        return;
    kill(-c->pid, number);
    if (c->tty && c->out[0].source.fd >= 0) {
        pid_t foreground = tcgetpgrp(c->out[0].source.fd);
        if (foreground > 1 && foreground != c->pid)
            kill(-foreground, number);
    }
    if (number == SIGKILL) {
        kill(c->pid, SIGKILL); /* it may not have made its group yet */
        kill_session(c->pid);
    }
}

void enforce_times(void)
{
    uint64_t now = 0;
    for (struct command *c = guest.commands; c; c = c->next) {
        if (!c->deadline && !c->quiet_due)
            continue;
        if (!now)
            now = clock_ns(CLOCK_MONOTONIC);
        bool late = c->deadline && now >= c->deadline;
        if (!late && !(c->quiet_due && now >= c->quiet_due))
            continue;
        c->timed_out = late ? TIMEOUT_LIFE : TIMEOUT_QUIET;
        c->deadline = c->quiet_due = 0;
        signal_command(c, SIGKILL);
    }
}

int next_deadline_ms(void)
{
    uint64_t next = UINT64_MAX, now;
    for (struct command *c = guest.commands; c; c = c->next) {
        if (c->deadline && c->deadline < next)
            next = c->deadline;
        if (c->quiet_due && c->quiet_due < next)
            next = c->quiet_due;
    }
    bool seen = guest.connection.source.fd >= 0 && !guest.connection.port;
    if (guest.lease_ns && !seen && guest.lonely_since + guest.lease_ns < next)
        next = guest.lonely_since + guest.lease_ns;
    if (guest.patience_ends && guest.patience_ends < next)
        next = guest.patience_ends;
    if (next == UINT64_MAX)
        return -1;
    now = clock_ns(CLOCK_MONOTONIC);
    uint64_t wait = next > now ? (next - now) / 1000000 + 1 : 0;
    return wait > 60000 ? 60000 : (int)wait;
}

/* Free what nobody will ask about any more. Streams that a background process holds stay open: it would
 * be killed by a write to a closed pipe. */
void sweep_commands(void)
{
    for (struct command **at = &guest.commands; *at;) {
        struct command *c = *at;
        if (!c->forgotten || !c->ended) {
            at = &c->next;
            continue;
        }
        for (int i = 0; i < 2; i++) {
            free(c->out[i].ring);
            free(c->out[i].tail);
            c->out[i].ring = c->out[i].tail = NULL;
        }
        if (c->out[0].source.fd >= 0 || c->out[1].source.fd >= 0) {
            at = &c->next;
            continue;
        }
        *at = c->next;
        free(c);
    }
}
