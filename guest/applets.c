/* Operations on files and ports. Each runs in a process of its own, as the user asked for, with the
 * streams of a command: a FIFO or a slow disk holds up nobody else, and it can be killed. Results go to
 * standard output; an error is fields on standard error and status 1. */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/inotify.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include "guest.h"

#define CHUNK (128 * 1024)
#define KEPT 4 /* the descriptor that the node asked for */

bool put_all(int fd, const void *data, size_t length)
{
    for (const char *at = data; length;) {
        ssize_t n = write(fd, at, length);
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0)
            return false;
        at += n;
        length -= (size_t)n;
    }
    return true;
}

int applet_failed(const char *what)
{
    struct bytes message = {0};
    put_number(&message, T_ERRNO, (uint64_t)errno);
    put_text(&message, T_TEXT, what);
    put_all(2, message.data, message.length);
    return 1;
}

static int emit(struct bytes *fields)
{
    bool written = put_all(1, fields->data, fields->length);
    bytes_free(fields);
    return written ? 0 : applet_failed("write the result");
}

/* read PATH OFFSET LENGTH; a length of 0 means to the end */
static int read_file(const char *path, const char *offset, const char *length)
{
    char *chunk = allocate(CHUNK);
    uint64_t left = strtoull(length, NULL, 10);
    bool all = left == 0;
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    struct stat status;
    if (fd < 0 || fstat(fd, &status))
        return applet_failed(path);
    if (S_ISDIR(status.st_mode)) {
        errno = EISDIR;
        return applet_failed(path);
    }
    off_t start = (off_t)strtoull(offset, NULL, 10);
    if (start && lseek(fd, start, SEEK_SET) < 0)
        return applet_failed(path);
    while (all || left) {
        ssize_t n = read(fd, chunk, all || left > CHUNK ? CHUNK : left);
        if (n < 0)
            return applet_failed(path);
        if (n == 0)
            break;
        if (!put_all(1, chunk, (size_t)n))
            return applet_failed("write the result");
        left -= all ? 0 : (uint64_t)n;
    }
    return 0;
}

static bool make_parents(const char *path, mode_t mode)
{
    char *copy = strdup(path);
    bool made = true;
    for (char *slash = strchr(copy + 1, '/'); slash && made; slash = strchr(slash + 1, '/')) {
        *slash = 0;
        made = mkdir(copy, mode) == 0 || errno == EEXIST;
        *slash = '/';
    }
    free(copy);
    return made;
}

/* write PATH MODE HOW: octal mode or "-" (0644, or as it is); how: letters of "axp": append, exclusive,
 * make parents */
static int write_file(const char *path, const char *mode, const char *how)
{
    char *chunk = allocate(CHUNK);
    int flags = O_WRONLY | O_CREAT | O_CLOEXEC | (strchr(how, 'a') ? O_APPEND : O_TRUNC);
    mode_t bits = *mode == '-' ? 0644 : (mode_t)strtoul(mode, NULL, 8);
    if (strchr(how, 'p') && !make_parents(path, 0755))
        return applet_failed(path);
    int fd = open(path, flags | (strchr(how, 'x') ? O_EXCL : 0), bits);
    if (fd < 0 || (*mode != '-' && fchmod(fd, bits)))
        return applet_failed(path);
    for (ssize_t n; (n = read(0, chunk, CHUNK)) != 0;)
        if (n < 0 || !put_all(fd, chunk, (size_t)n))
            return applet_failed(path);
    return close(fd) ? applet_failed(path) : 0;
}

static int put_status(struct bytes *out, const char *name, const char *full)
{
    struct stat s;
    char target[4096];
    if (lstat(full, &s))
        return -1;
    put_text(out, T_PATH, name);
    put_number(out, T_KIND, s.st_mode & S_IFMT);
    put_number(out, T_MODE, s.st_mode & 07777);
    put_number(out, T_SIZE, (uint64_t)s.st_size);
    put_number(out, T_UID, s.st_uid);
    put_number(out, T_GID, s.st_gid);
    put_number(out, T_MTIME, (uint64_t)s.st_mtim.tv_sec * 1000000000u + (uint64_t)s.st_mtim.tv_nsec);
    put_number(out, T_CTIME, (uint64_t)s.st_ctim.tv_sec * 1000000000u + (uint64_t)s.st_ctim.tv_nsec);
    ssize_t n = S_ISLNK(s.st_mode) ? readlink(full, target, sizeof target) : -1;
    if (n >= 0)
        put_field(out, T_LINK_TARGET, target, (size_t)n);
    return 0;
}

/* stat PATH FOLLOW */
static int stat_path(const char *path, const char *follow)
{
    struct bytes out = {0};
    char *real = *follow == '1' ? realpath(path, NULL) : strdup(path);
    if (!real || put_status(&out, path, real))
        return applet_failed(path);
    return emit(&out);
}

/* list PATH DEPTH: names relative to the path, parents before what is in them */
static int list_directory(const char *path, const char *prefix, int depth)
{
    DIR *directory = opendir(path);
    if (!directory)
        return applet_failed(path);
    struct bytes out = {0};
    int result = 0;
    for (struct dirent *entry; !result && (entry = readdir(directory));) {
        char *full, *name;
        if (!strcmp(entry->d_name, ".") || !strcmp(entry->d_name, ".."))
            continue;
        if (asprintf(&full, "%s/%s", path, entry->d_name) < 0 ||
            asprintf(&name, "%s%s", prefix, entry->d_name) < 0)
            return applet_failed(path);
        struct stat s;
        bool there = put_status(&out, name, full) == 0; /* else it has just gone */
        if (there && depth > 1 && lstat(full, &s) == 0 && S_ISDIR(s.st_mode)) {
            char *deeper;
            result = emit(&out);
            if (!result && asprintf(&deeper, "%s/", name) >= 0) {
                result = list_directory(full, deeper, depth - 1);
                free(deeper);
            }
        } else if (out.length > CHUNK) {
            result = emit(&out);
        }
        free(full);
        free(name);
    }
    closedir(directory);
    return result ? result : emit(&out);
}

/* Where a walk has come from. */
struct place { dev_t device; ino_t inode; char *name; };

static DIR *open_directory(int parent, const char *name)
{
    int fd = openat(parent, name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
    DIR *directory = fd < 0 ? NULL : fdopendir(fd);
    if (fd >= 0 && !directory)
        close(fd);
    return directory;
}

/* Back up, if that is still where we came from: somebody may have moved the directory meanwhile. */
static DIR *climb(DIR *directory, const struct place *from)
{
    struct stat s;
    DIR *above = open_directory(dirfd(directory), "..");
    closedir(directory);
    if (above && (fstat(dirfd(above), &s) || s.st_dev != from->device || s.st_ino != from->inode)) {
        closedir(above);
        errno = ESTALE;
        return NULL;
    }
    return above;
}

static DIR *descend(DIR *directory, const char *name, struct bytes *places)
{
    struct stat s;
    DIR *below = fstat(dirfd(directory), &s) ? NULL : open_directory(dirfd(directory), name);
    struct place place = {.device = s.st_dev, .inode = s.st_ino, .name = below ? strdup(name) : NULL};
    if (below)
        bytes_add(places, &place, sizeof place);
    closedir(directory);
    return below;
}

/* Empty a directory. However deep it is, this takes one open file and no stack. Closes it. */
static int empty_directory(DIR *directory)
{
    struct bytes places = {0};
    while (directory) {
        struct dirent *entry = readdir(directory);
        if (entry && (!strcmp(entry->d_name, ".") || !strcmp(entry->d_name, "..")))
            continue;
        if (!entry && !places.length) {
            closedir(directory);
            bytes_free(&places);
            return 0;
        }
        if (!entry) {
            struct place place;
            places.length -= sizeof place;
            memcpy(&place, places.data + places.length, sizeof place);
            directory = climb(directory, &place);
            if (directory && unlinkat(dirfd(directory), place.name, AT_REMOVEDIR))
                break;
            free(place.name);
        } else if (unlinkat(dirfd(directory), entry->d_name, 0)) {
            if (errno != EISDIR)
                break;
            directory = descend(directory, entry->d_name, &places);
        }
    }
    return -1;
}

static int remove_at(int parent, const char *name)
{
    if (unlinkat(parent, name, 0) == 0)
        return 0;
    if (errno != EISDIR)
        return -1;
    DIR *directory = open_directory(parent, name);
    return directory && empty_directory(directory) == 0 ? unlinkat(parent, name, AT_REMOVEDIR) : -1;
}

/* remove PATH RECURSIVE */
static int remove_path(const char *path, const char *recursive)
{
    struct stat s;
    if (lstat(path, &s))
        return applet_failed(path);
    int result = *recursive == '1' ? remove_at(AT_FDCWD, path)
                                   : S_ISDIR(s.st_mode) ? rmdir(path) : unlink(path);
    return result ? applet_failed(path) : 0;
}

/* mkdir PATH MODE PARENTS */
static int make_directory(const char *path, const char *mode, const char *parents)
{
    mode_t bits = (mode_t)strtoul(mode, NULL, 8);
    struct stat s;
    if (*parents == '1' && !make_parents(path, 0755))
        return applet_failed(path);
    if (mkdir(path, bits) == 0)
        return chmod(path, bits) ? applet_failed(path) : 0;
    bool there = errno == EEXIST && *parents == '1' && stat(path, &s) == 0 && S_ISDIR(s.st_mode);
    errno = there ? 0 : EEXIST;
    return there ? 0 : applet_failed(path);
}

/* chown PATH USER */
static int change_owner(const char *path, const char *owner)
{
    struct user user;
    const char *wrong = find_user(owner, &user);
    if (wrong) {
        errno = EINVAL;
        return applet_failed(wrong);
    }
    return lchown(path, user.uid, user.gid) ? applet_failed(path) : 0;
}

/* watch PATH: one record an event, until killed; the first one, empty, says that it has begun */
static int watch_path(const char *path)
{
    char events[16384] __attribute__((aligned(8)));
    int fd = inotify_init1(IN_CLOEXEC);
    uint32_t mask = IN_CREATE | IN_DELETE | IN_MODIFY | IN_CLOSE_WRITE | IN_MOVED_FROM | IN_MOVED_TO |
                    IN_ATTRIB | IN_DELETE_SELF | IN_MOVE_SELF;
    if (fd < 0 || inotify_add_watch(fd, path, mask) < 0)
        return applet_failed(path);
    struct bytes out = {0};
    put_number(&out, T_MASK, 0);
    if (emit(&out))
        return 1;
    for (ssize_t n; (n = read(fd, events, sizeof events)) > 0;) {
        for (char *at = events; at < events + n;) {
            struct inotify_event *event = (struct inotify_event *)at;
            put_number(&out, T_MASK, event->mask);
            put_number(&out, T_COOKIE, event->cookie);
            put_text(&out, T_PATH, event->len ? event->name : "");
            at += sizeof *event + event->len;
        }
        if (emit(&out))
            return 1;
    }
    return applet_failed(path);
}

static int open_connection(const char *host, const char *port)
{
    struct sockaddr_un local = {.sun_family = AF_UNIX};
    struct sockaddr_in6 v6 = {.sin6_family = AF_INET6, .sin6_port = htons((uint16_t)atoi(port))};
    struct sockaddr_in v4 = {.sin_family = AF_INET, .sin_port = htons((uint16_t)atoi(port))};
    const void *address = &v4;
    socklen_t size = sizeof v4;
    int family = AF_INET;
    if (*host == '/') {
        snprintf(local.sun_path, sizeof local.sun_path, "%s", host);
        family = AF_UNIX, address = &local, size = sizeof local;
    } else if (inet_pton(AF_INET6, host, &v6.sin6_addr) == 1) {
        family = AF_INET6, address = &v6, size = sizeof v6;
    } else if (inet_pton(AF_INET, host, &v4.sin_addr) != 1) {
        errno = EINVAL;
        return -1;
    }
    int fd = socket(family, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (fd >= 0 && connect(fd, address, size)) {
        int error = errno;
        close(fd);
        errno = error;
        return -1;
    }
    return fd;
}

/* connect HOST PORT: an address in the box, or the path of a socket; bytes to and fro. An empty record on
 * standard error says that the connection stands. */
static int connect_port(const char *host, const char *port)
{
    char *chunk = allocate(CHUNK);
    int fd = open_connection(host, port), one = 1;
    if (fd < 0)
        return applet_failed(host);
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    struct bytes ready = {0};
    put_number(&ready, T_ERRNO, 0);
    put_all(2, ready.data, ready.length);
    struct pollfd wait[2] = {{.fd = 0, .events = POLLIN}, {.fd = fd, .events = POLLIN}};
    for (;;) {
        if (poll(wait, 2, -1) < 0)
            return applet_failed("poll");
        for (int i = 0; i < 2; i++) {
            if (!wait[i].revents)
                continue;
            ssize_t n = read(wait[i].fd, chunk, CHUNK);
            if (n < 0 && i == 1)
                return applet_failed(host);
            if (n > 0 && !put_all(i ? 1 : fd, chunk, (size_t)n))
                return applet_failed(host);
            if (n <= 0 && i == 1)
                return 0;
            if (n <= 0) { /* no more from the caller: answers may still come */
                shutdown(fd, SHUT_WR);
                wait[0].fd = -1;
            }
        }
    }
}

int run_applet(int count, char **a)
{
    static const struct { const char *name; int arguments; } known[] = {
        {"read", 3}, {"write", 3}, {"stat", 2}, {"list", 2}, {"remove", 2}, {"rename", 2}, {"mkdir", 3},
        {"chmod", 2}, {"chown", 2}, {"symlink", 2}, {"watch", 1}, {"connect", 2}, {"pack", 1}, {"unpack", 1},
        {"usage", 0}, {"changes", 0}, {"sync", 0},
    };
    size_t which = 0, size = sizeof known / sizeof *known;
    while (which < size && strcmp(known[which].name, a[0]))
        which++;
    if (which == size || known[which].arguments != count - 1) {
        errno = ENOSYS;
        return applet_failed(a[0]);
    }
    switch (which) {
    case 0: return read_file(a[1], a[2], a[3]);
    case 1: return write_file(a[1], a[2], a[3]);
    case 2: return stat_path(a[1], a[2]);
    case 3: return list_directory(a[1], "", atoi(a[2]));
    case 4: return remove_path(a[1], a[2]);
    case 5: return rename(a[1], a[2]) ? applet_failed(a[1]) : 0;
    case 6: return make_directory(a[1], a[2], a[3]);
    case 7: return chmod(a[1], (mode_t)strtoul(a[2], NULL, 8)) ? applet_failed(a[1]) : 0;
    case 8: return change_owner(a[1], a[2]);
    case 9: return symlink(a[1], a[2]) ? applet_failed(a[2]) : 0;
    case 10: return watch_path(a[1]);
    case 11: return connect_port(a[1], a[2]);
    case 12: return pack(a[1]);
    case 13: return unpack(a[1], false);
    case 14: return show_usage();
    case 15: return pack_layer(KEPT);
    default: sync(); return 0;
    }
}
