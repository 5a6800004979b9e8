/* The init of a box: one connection to the node daemon, and the commands that it asked for. */
#ifndef HADAL_GUEST_H
#define HADAL_GUEST_H

#include <stdbool.h>
#include <stdint.h>
#include <sys/types.h>

#include "bytes.h"
#include "protocol.h"

#define KEPT_MAX 2 /* descriptors, numbers 4 and 5 of a command */

/* What epoll tells us about: the first member of everything that is registered. */
enum source_kind { S_LISTEN, S_CONNECTION, S_SIGNALS, S_STREAM, S_INPUT, S_REPORT, S_PRESSURE };
struct source {
    enum source_kind kind;
    int fd;          /* -1: closed */
    uint32_t events; /* that are registered */
    struct command *command;
};

/* Output of a command: a ring with what has not been acknowledged, at most WINDOW bytes. */
struct stream {
    struct source source;
    uint8_t *ring;
    uint64_t capacity;
    uint64_t start, end, sent; /* offsets: the ring holds [start, end) */
    uint64_t limit, total;     /* bytes beyond the limit are counted, and the last TAIL of them kept */
    uint8_t *tail;
    uint64_t tail_total;
    uint64_t drain; /* bytes that may still be the command's when it has ended */
    bool settled;   /* it has ended, and all of its output is here */
};

struct command {
    struct command *next;
    uint64_t id;
    pid_t pid;
    bool tty, applet, started, failed, ended, exit_sent, tail_sent, attached, forgotten;
    int failure;
    int status, timed_out;
    uint64_t start_time, end_time;       /* ns since 1970 */
    uint64_t deadline, quiet, quiet_due; /* monotonic ns; 0: none */
    uint64_t user_us, system_us, max_rss_kb, oom_kills;
    struct stream out[2];
    struct source input, report;
    struct bytes pending; /* input that the command has not taken */
    bool input_ends;
    uint64_t input_taken, input_acknowledged;
};

struct connection {
    struct source source;
    bool welcomed;
    struct bytes in, out;
    struct port *port; /* that it goes through, in a virtual machine; else NULL: a socket */
};

struct guest {
    int epoll, oom_score;
    int priority; /* of commands: ours is higher */
    struct source listening, signals, pressure;
    uint64_t pressure_kills;
    struct connection connection;
    struct command *commands; /* newest first */
    uint64_t last_id;
    uint64_t lease_ns, lonely_since; /* how long it lives without a node daemon */
    uint64_t patience_ends; /* until then output waits for the next one; 0: it does not */
    char boot_id[33];
    int kept[KEPT_MAX]; /* descriptors for commands that are to have them, in a machine that of what it has changed; -1: none */
    char group[300];    /* directory of that of commands */
    int commands_group; /* the cgroup.procs that commands join; -1: none */
    int freezer, events; /* of that group: its cgroup.freeze and cgroup.events */
    int boot_id_file;    /* what a machine says is the id of its boot */
    bool machine;       /* this kernel is the box's own */
};

extern struct guest guest;

/* init.c */
_Noreturn void serve(int oom_score, int priority, uint64_t lease_ns);
void handle_frames(void);
void watch(struct source *source, uint32_t events);
void unwatch(struct source *source); /* and close */
uint64_t clock_ns(int clock);

/* port.c: a connection through the port of a virtual machine */
ssize_t read_port(struct connection *c);  /* as read(2), into c->in; frames before a beginning are handled */
void begin_port(struct connection *c);    /* what goes out from here on belongs to a new connection */
bool flush_port(struct connection *c);    /* whether all of c->out has gone out */
bool port_output_left(const struct port *port);
_Noreturn void serve_port(int port, int oom_score, uint64_t lease_ns);

/* boot.c */
_Noreturn void boot_machine(void);
_Noreturn void join_machine(void); /* as a service of its system */

/* machine.c */
bool read_line(const char *path, char *line, size_t size); /* the first one, without its end; false if there is none */
bool find_link(char *name); /* of IFNAMSIZ; false if there is none */
int show_usage(void); /* an applet */
uint64_t count_oom_kills(void); /* that this kernel has ever made, or we for it */
const char *settle_machine(const uint8_t *payload, size_t length); /* NULL, or what went wrong: see errno */

/* pressure.c: of a machine's memory */
void watch_pressure(void);
void relieve_pressure(void);

/* command.c */
void start_command(uint64_t id, const uint8_t *payload, size_t length);
struct command *find_command(uint64_t id);
void give_input(struct command *c, const uint8_t *data, size_t length);
void end_input(struct command *c);
void take_report(struct command *c);
void write_input(struct command *c);
void resize_command(struct command *c, unsigned short rows, unsigned short columns);
void signal_command(struct command *c, int signal);
void command_died(struct command *c, int status);
void enforce_times(void);
int next_deadline_ms(void);
void sweep_commands(void);

/* stream.c */
void read_stream(struct stream *s);
void settle_stream(struct stream *s);
void acknowledge(struct command *c, uint64_t out, uint64_t err);
void attach_command(struct command *c, uint64_t out, uint64_t err);
void detach_all(void);
void wake_unattached(void);
bool send_pending(struct command *c); /* frames into the connection; whether anything was added */

/* users.c */
struct user {
    uid_t uid;
    gid_t gid, groups[64];
    int group_count;
    char home[256];
};
const char *find_user(const char *text, struct user *user); /* NULL, or what is wrong */

/* applets.c: file operations, each in a process of its own */
int run_applet(int count, char **arguments);
int applet_failed(const char *what);
bool put_all(int fd, const void *data, size_t length);
/* pack.c, unpack.c */
int pack(const char *path);
int pack_layer(int upper); /* the upper directory of an overlay */
int unpack(const char *path, bool image_layer);

#endif
