/* Making a box: what the node daemon asks for, and the steps that turn a new process into its init. */
#ifndef HADAL_LAUNCH_H
#define HADAL_LAUNCH_H

#include <stdbool.h>
#include <stdint.h>

#include "bytes.h"
#include "guest.h"

#define MANY 128 /* of any repeated field */
#define SENT_MAX (1 + KEPT_MAX) /* descriptors with a request */

struct list {
    char *items[MANY];
    uint32_t sizes[MANY];
    int count;
};

struct launch {
    uint64_t request;
    char *hostname, *scratch, *run_directory, *socket, *netns;
    uint64_t scratch_bytes, scratch_inodes, shm_bytes;
    uint64_t uid_base, uid_count, lease_s;
    uint64_t keep;
    bool user_namespace, volatile_overlay, read_only;
    struct list lowers, cgroups, files, binds, tmpfs, rlimits, devices;

    int reply;        /* socket to the node daemon */
    int netns_fd;     /* -1: a new network namespace */
    int scratch_fd;   /* a mount that nobody else has; -1: by path, or a tmpfs */
    int kept_fds[KEPT_MAX]; /* for commands that are to have them; -1: none */
    int listening;    /* the socket of the guest */
    uint64_t started; /* monotonic ns */
    const char *phase;
};

/* NULL, or what is wrong with it. Everything is copied out of the payload. Sent along are SENT_MAX descriptors;
 * -1: none. */
const char *read_launch(struct launch *launch, const uint8_t *payload, size_t length, const int *sent);

/* Whether it may open a device. */
bool has_device(const struct launch *launch, const char *name);

/* launch.c: in the new process; does not return. */
_Noreturn void become_box(struct launch *launch);
_Noreturn void launch_failed(struct launch *launch, const char *detail);

/* mounts.c */
void build_root(struct launch *launch, int user_namespace);
void enter_root(struct launch *launch);

/* confine.c */
void drop_privileges(struct launch *launch);
void join_new_keyring(void);

/* init.c: serves the node daemon on the socket; does not return. */
_Noreturn void serve_box(int listening, const int *kept, int oom_score, int priority, uint64_t lease_ns);

void send_event(int reply, uint64_t request, int event, struct bytes *fields);
uint64_t now_ns(void);

#endif
